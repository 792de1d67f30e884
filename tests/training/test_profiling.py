"""``--profile``: the steps it names are traced, part by part, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_nepa.config import ConfigError, PretrainingConfig
from megatron_nepa.training.reporting.profiling import StepProfiler
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain

CPU = torch.device("cpu")


def test_a_run_writes_the_trace_of_its_steps(tmp_path: Path) -> None:
    flags = [*TINY, f"--data={make_images(tmp_path / 'images')}", f"--output_dir={tmp_path / 'run'}"]
    assert run_ranks(1, pretrain, [*flags, "--steps=3", "--profile=2:3"]) == [None]
    events = json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # two steps of two micro-batches
    assert {part: names.count(part) for part in ("data", "forward", "backward", "optimizer")} == {
        "data": 4,
        "forward": 4,
        "backward": 4,
        "optimizer": 2,
    }
    assert "aten::" in (tmp_path / "run/profile/operations.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "run/profile").iterdir()) == ["operations.txt", "trace.json"]
    # a profile makes no other run: the same folder goes on without it
    assert run_ranks(1, pretrain, [*flags, "--steps=3"]) == [None]


def test_a_run_that_ends_early_keeps_what_was_recorded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with StepProfiler(range(1, 10), tmp_path / "profile", CPU) as profiler:
        profiler.before(1)
        with profiler.part("forward"):
            torch.ones(2) + 1
        assert profiler.after(1) is None
    assert (tmp_path / "profile/trace.json").is_file()
    assert "ERROR" not in capfd.readouterr().err  # of a GPU that a CPU has not


def test_nothing_is_written_without_a_profile(tmp_path: Path) -> None:
    with StepProfiler(range(0), tmp_path / "profile", CPU) as profiler:
        profiler.before(1)
        with profiler.part("forward"):
            pass
        profiler.after(1)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("text", ["3", "0:2", "3:2", "a:b", "1:2:3", "-1:2"])
def test_a_profile_that_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="START:STOP"):
        PretrainingConfig(steps=5, profile=text)


def test_a_profile_after_the_end_of_the_run_is_refused(tmp_path: Path) -> None:
    flags = [*TINY, f"--data={make_images(tmp_path / 'images')}", f"--output_dir={tmp_path / 'run'}"]
    (error,) = run_ranks(1, pretrain, [*flags, "--steps=3", "--profile=4:5"])
    assert error is not None
    assert "--profile 4:5 begins after the last of the run's 3 steps" in error
    assert not (tmp_path / "run").exists()


def test_both_ends_count() -> None:
    assert list(PretrainingConfig(steps=5, profile="2:4").profiled_steps) == [2, 3, 4]
    assert len(PretrainingConfig(steps=5).profiled_steps) == 0
