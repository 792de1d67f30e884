"""The run's log: metrics.jsonl, console, progress bar and wandb."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_nepa.config import ModelConfig, RunConfig
from megatron_nepa.training.reporting.log import Row, RunLog, dense_line
from megatron_nepa.training.reporting.metric_display import METRICS
from megatron_nepa.training.reporting.metrics_file import read_metrics, truncate_metrics

ROW: Row = {
    "step": 120,
    "loss": -0.81234,
    "grad_norm": 0.41188,
    "lr": 4.8e-4,
    "samples_per_second": 412.3,
    "tflops_per_device": 0.3512,
    "mfu": 0.4119,
    "data_wait_ms": 3.2,
    "memory_gb": 1.21,
    "skipped_steps": 0,
    "target_effective_rank": 35.12,
}


def config(wandb: Any = "disabled") -> RunConfig:
    model = ModelConfig(image_size=32, patch_size=8, hidden_size=48, num_layers=2, num_heads=4, mlp_hidden_size=64)
    return RunConfig(model=model, steps=200, wandb=wandb)


def test_dense_line() -> None:
    assert dense_line(ROW, 200) == (
        "step 120/200 | loss -0.8123 | grad 0.412 | lr 4.8e-04 | 412 img/s | 0.351 TFLOP/s | MFU 41.2% | data 3 ms | "
        "1.2 GB | eff. rank 35.1"
    )
    assert dense_line({"step": 7, "loss": math.nan, "grad_norm": math.inf, "skipped_steps": 2}, 12000) == (
        "step     7/12000 | loss nan | grad inf | skipped 2"
    )
    assert dense_line({"step": 4, "val_top1": 0.5, "probe_ema_knn_top1": 0.1234, "val_loss": 2.0}, 4) == (
        "step 4/4 | top-1 50.00% | EMA kNN 12.34%"
    )
    assert "| 12346 img/s |" in dense_line({**ROW, "samples_per_second": 12345.6}, 200)
    assert "| grad 0.000512 |" in dense_line({**ROW, "grad_norm": 5.12e-4}, 200)


def test_metrics_are_ordered_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, config(), 200, 0)
    log.write([{"accuracy": 0.5, "loss": math.nan, "grad_norm": math.inf, "step": 1}])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed while the log is open
    assert lines == ['{"step": 1, "loss": null, "grad_norm": null, "accuracy": 0.5}']
    keys = [metric.name for metric in METRICS]
    log.write([dict.fromkeys(reversed(keys), 2), {"step": 3, "loss": -0.1}])
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert list(rows[1]) == keys
    assert capsys.readouterr().out.splitlines()[0] == "step   1/200 | loss nan | grad inf"


def test_unwritable_metrics_warn_once_and_recover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    log = RunLog(folder, config(), 200, 0)  # the folder is gone
    log.write([{"step": 1, "loss": 0.0}])
    log.write([{"step": 2, "loss": 0.0}])
    output = capsys.readouterr().out
    assert output.count("warning:") == 1
    assert "step   2/200" in output
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo')  # a write that stopped half-way
    log.write([{"step": 3, "loss": 0.0}])
    log.write([{"step": 4, "loss": 0.0}])
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [3, 4]
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, config(), 200, 0)
    log.write([{"step": 1}])
    assert "No space left on device" in capsys.readouterr().out


def test_progress_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = RunLog(tmp_path, config(), 200, 100)
    log.write([{**ROW, "step": 119}, ROW])
    log.message("a checkpoint")
    log.close()
    output = capsys.readouterr()
    assert output.out == "a checkpoint\n"
    last = output.err.rstrip().split("\r")[-1]
    assert last.startswith(" 60% ")
    assert "120/200" in last
    assert last.endswith(dense_line(ROW, 200).removeprefix("step 120/200 | "))


def test_truncate_moves_later_rows_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step, "loss": -0.1 * step}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"step": "x"}\n{"step": 6, "lo')
    truncate_metrics(path, 3)
    assert path.read_text().splitlines() == lines[:3]
    replaced = tmp_path / "metrics.replaced.jsonl"
    assert replaced.read_text().splitlines() == lines[3:]
    truncate_metrics(path, 2)
    assert path.read_text().splitlines() == lines[:2]
    assert replaced.read_text().splitlines() == [*lines[3:], lines[2]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.replaced.jsonl"]


def test_wandb_offline_lies_under_the_run_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        log = RunLog(tmp_path, config("offline"), 200, step - 1)
        log.write([{**ROW, "step": step}])
        log.close()
    run_id = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # wandb's service may write after the session's end
    while not all(b"target_effective_rank" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "wandb failed" not in capsys.readouterr().out


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_failing_wandb_warns_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionError("no network")

    def nothing(*arguments: Any, **keywords: Any) -> None:
        return None

    session = SimpleNamespace(define_metric=nothing, log=nothing, finish=nothing)
    module = SimpleNamespace(init=lambda **keywords: session, Settings=nothing)
    setattr(module if where == "init" else session, where, fail)
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = RunLog(tmp_path, config("online"), 200, 0)
    log.write([{"step": 1}, {"step": 2}])
    log.close()
    assert capsys.readouterr().out.count("warning: wandb failed (no network)") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
