"""One process of the study: it trains one cell after the other, on one core, without starting anew."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.ablations.cells import Cell, Flags, Pretraining, batch_size
from examples.ablations.results import Record, today

_POINTS = 100  # of a curve


class Task(NamedTuple):
    """A pre-training and what starts from it.

    Attributes:
        start: the pre-training; None of cells from scratch.
        cells: that start from it.
        data: folder of the prepared photographs.
        folder: of all runs.
        is_known: whether the pre-training's record is there already, so that only its weights are needed.
    """

    start: Pretraining | None
    cells: tuple[Cell, ...]
    data: Path
    folder: Path
    is_known: bool


class Outcome(NamedTuple):
    """Records by key; ``stopped`` says why a task ended early: its work continues in the next start."""

    pretraining: tuple[str, Record] | None
    cells: dict[str, Record]
    stopped: str | None = None


def begin(log_folder: Path) -> None:
    """Called once in every process: what trainings print goes to a file of its own."""
    log_folder.mkdir(parents=True, exist_ok=True)
    log = os.open(log_folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def carry_out(task: Task) -> Outcome:
    """Pre-train, then fine-tune or probe each cell.

    The pre-trained weights stay for later cells that start from them, on the same machine; fine-tuned ones are removed.

    Raises:
        ConfigError: for settings that a training refuses.
    """
    from examples.finetune_classification import main as finetune
    from examples.linear_probe import main as probe
    from megatron_nepa.training.stopping.errors import RunStopped
    from pretrain_nepa import main as pretrain

    start, pretraining = task.start, None
    folder = task.folder / (start.key if start is not None else f"scratch_{task.cells[0].key}")
    cells: dict[str, Record] = {}
    try:
        if start is not None:
            where: Flags = {"data": task.data / "train.index", "output_dir": folder / "pretraining"}
            record = _train(pretrain, start.flags | where)
            record["objective"] = start.objective
            pretraining = None if task.is_known else (start.key, record)
        for cell in task.cells:
            if start is not None and record["failed"]:
                cells[cell.key] = {**_blank(), "accuracy": None, "failed": record["failed"]}
                continue
            where = {**cell.data(task.data), "output_dir": folder / cell.key}
            if start is not None:
                where["trunk" if cell.use == "probe" else "init_from"] = folder / "pretraining"
            result = _train(probe if cell.use == "probe" else finetune, cell.flags | where)
            last = result.pop("last")
            result.pop("curves")
            cells[cell.key] = {**result, "accuracy": last.get("val_top1")}
            shutil.rmtree(folder / cell.key, ignore_errors=True)
    except RunStopped as stop:
        return Outcome(pretraining, cells, str(stop))
    return Outcome(pretraining, cells)


def _train(script: Callable[[Sequence[str]], None], flags: Flags) -> Record:
    """Call a training script; its log's last row and curves. A training that diverges leaves its sentence."""
    from megatron_nepa.training.reporting.metrics_file import read_metrics
    from megatron_nepa.training.stopping.errors import TrainingError

    started, failed = time.monotonic(), None
    try:
        script([f"--{name}={value}" for name, value in flags.items()])
    except TrainingError as error:
        failed = str(error)
    logged = read_metrics(Path(str(flags["output_dir"])) / "metrics.jsonl")
    rows = [row for row in logged if "step_ms" in row]  # an evaluation that a continued run made up for has its own row
    # by the steps' own times, so that a training which was continued counts whole, and one that was suspended no more
    steps_ms = [row["step_ms"] for row in rows]
    seconds = len(rows) * statistics.median(steps_ms) / 1e3 if rows else time.monotonic() - started
    last = {name: value for row in logged if row["step"] == logged[-1]["step"] for name, value in row.items()}
    return {
        **_blank(),
        "flags": {name: str(value) for name, value in flags.items() if not isinstance(value, Path)},
        "seconds": round(seconds, 1),
        "failed": failed,
        "last": last,
        "flops_per_image": last.get("tflops_per_device", 0.0) * 1e9 * last.get("step_ms", 0.0) / batch_size(flags),
        "curves": _curves(rows),
    }


def _blank() -> Record:
    from megatron_nepa.benchmarks.machine import cpu_name

    return {"seconds": 0.0, "failed": None, "machine": cpu_name(), "date": today()}


def _curves(rows: list[Record]) -> dict[str, list[float]]:
    """Step, loss and gradient norm of at most a hundred evenly spaced steps."""
    chosen = rows[:: max(1, len(rows) // _POINTS)]
    return {name: [round(float(row[name]), 5) for row in chosen] for name in ("step", "loss", "grad_norm")}
