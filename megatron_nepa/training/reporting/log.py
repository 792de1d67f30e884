"""What a run says about itself: metrics.jsonl, the console and Weights & Biases.

Its rows are made elsewhere: a step's by :mod:`megatron_nepa.training.step`, with what the task's ``forward`` returned.

The log never ends a run: where a file cannot be written or wandb fails, it says so once and the training goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_nepa.config import RunConfig
from megatron_nepa.training.reporting.metric_display import METRICS, console_of_sources
from megatron_nepa.training.reporting.waiting import waiting_for

Row = dict[str, float | int]


class Log(Protocol):
    """What a run says about itself, on whichever rank."""

    def write(self, rows: list[Row]) -> None:
        """Log consecutive steps; a row holds any of the table of metrics and others, its "step" counts from 1."""

    def advance(self, step: int) -> None:
        """Move the progress bar, where there is one, to a step whose row may be written later."""

    def message(self, text: str) -> None:
        """Print ``text`` to the console, above the progress bar where there is one."""

    def warn(self, text: str | None) -> None:
        """Print ``text`` where there is one: several that say what may go wrong return None where nothing will."""

    def waiting_for(self, what: str) -> AbstractContextManager[None]:
        """A block, such as "saving the checkpoint", that is named where it takes long."""

    def close(self) -> None:
        """End the progress bar and wait for wandb to finish."""


class SilentLog:
    """The log of every rank but the main one: says nothing."""

    def write(self, rows: list[Row]) -> None: ...

    def advance(self, step: int) -> None: ...

    def message(self, text: str) -> None: ...

    def warn(self, text: str | None) -> None: ...

    def waiting_for(self, what: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None: ...


class RunLog:
    """Log of a run, opened on its main rank only; its methods are those of :class:`Log`.

    Args:
        output_dir: folder of the run: metrics.jsonl, wandb's files and wandb_id lie there.
        run: the run's config.
        total_steps: optimizer steps of the whole run.
        start_step: steps that were completed before, when the run continues a checkpoint.
    """

    def __init__(self, output_dir: Path, run: RunConfig, total_steps: int, start_step: int) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._total_steps = total_steps
        self._torn = False  # whether the last write of the metrics may have ended inside a line
        self._warned: set[str] = set()
        self._is_offline = run.wandb == "offline"
        self._bar: tqdm[Any] | None = None
        # before the bar, which what wandb prints at its start would break
        self._wandb = self._start_wandb(output_dir, run) if run.wandb != "disabled" else None
        if sys.stdout.isatty() and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                bar_format="{percentage:3.0f}% {bar:10} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}",
                dynamic_ncols=True,
            )

    def write(self, rows: list[Row]) -> None:
        """Log consecutive steps; a row holds any of the table of metrics and others, its "step" counts from 1."""
        self._append([json.dumps(_ordered(row), allow_nan=False) for row in rows])
        for row in rows:
            if self._bar is None:
                self.message(dense_line(row, self._total_steps))
            if self._wandb is not None:
                with self._wandb_guard():
                    self._wandb.log(dict(row))
        if self._bar is not None and rows:
            self._bar.set_description_str(" | ".join(_parts(rows[-1])), refresh=False)
            self._bar.update(int(rows[-1]["step"]) - self._bar.n)
            self._bar.refresh()

    def advance(self, step: int) -> None:
        """Move the progress bar, where there is one, to a step whose row may be written later."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        """Print ``text`` to the console, above the progress bar where there is one."""
        with contextlib.suppress(OSError):  # a console on a full disk is no reason to stop
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def warn(self, text: str | None) -> None:
        """Print ``text`` where there is one: several that say what may go wrong return None where nothing will."""
        if text is not None:
            self.message(text)

    def waiting_for(self, what: str) -> AbstractContextManager[None]:
        """A block that is named once it has taken 5 seconds."""
        return waiting_for(what, is_main=True, say=self.message)

    def close(self) -> None:
        """End the progress bar and wait for wandb to finish."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._wandb is not None:
            with self._wandb_guard():
                session = self._wandb
                session.finish()
                if self._is_offline:
                    folder = Path(session.dir).parent  # its own files lie in "files" there
                    self.message(f"wandb wrote {folder} offline: send it with `wandb sync {folder}`")
            self._wandb = None

    def _append(self, lines: list[str]) -> None:
        # opened anew each time, so that a disk that comes back is written again
        try:
            with self._path.open("a") as file:
                file.write(("\n" if self._torn and file.tell() else "") + "".join(f"{line}\n" for line in lines))
            self._torn = False
        except OSError as error:
            self._torn = True
            self._warn_once("metrics", f"{self._path} misses rows ({error}); the run goes on.")

    def _start_wandb(self, output_dir: Path, run: RunConfig) -> Any:
        with self._wandb_guard():
            import wandb

            id_path = output_dir / "wandb_id"
            if id_path.exists():
                run_id = id_path.read_text().strip()
            else:
                run_id = secrets.token_hex(4)
                id_path.write_text(run_id)
            session = wandb.init(
                project=run.wandb_project,
                name=output_dir.resolve().name,
                id=run_id,
                resume="allow",
                mode=run.wandb,  # type: ignore[arg-type]
                dir=str(output_dir),
                config=run.to_dict(),
                settings=wandb.Settings(quiet=True),  # no summary at the end: the console has had every number
            )
            # our own axis: steps repeated after a resume would be dropped as going back in wandb's
            session.define_metric("step")
            session.define_metric("*", step_metric="step")
            return session
        return None

    @contextlib.contextmanager
    def _wandb_guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any failure of an optional service
            self._wandb = None
            self._warn_once("wandb", f"wandb failed ({error}); the run goes on without it.")

    def _warn_once(self, topic: str, text: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            self.message(f"warning: {text}")


def dense_line(row: Row, total_steps: int) -> str:
    """One line that tells how a step went, for example
    ``step 120/200 | loss -0.8123 | grad 0.412 | lr 4.8e-04 | 412 img/s | 0.35 TFLOP/s | MFU 41.2% | data 3 ms | ...``.
    """
    width = len(str(total_steps))
    return " | ".join([f"step {row['step']:>{width}}/{total_steps}", *_parts(row)])


def _parts(row: Row) -> list[str]:
    shown = (metric.console(row[metric.name]) for metric in METRICS if metric.console and metric.name in row)
    return [part for part in shown if part] + console_of_sources(row)


def _ordered(row: Row) -> dict[str, float | int | None]:
    known = [metric.name for metric in METRICS]
    keys = [key for key in known if key in row] + [key for key in row if key not in known]
    # JSON has no nan and no infinity
    return {key: row[key] if math.isfinite(row[key]) else None for key in keys}
