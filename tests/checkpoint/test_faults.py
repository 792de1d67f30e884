"""A run that is killed at any moment, or whose disk fails, continues as if nothing had happened."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.faults import (
    BACKGROUND,
    PLACES,
    fill_disk_in_save,
    pretrain_counting_lines,
    pretrain_until_killed,
    record_messages,
)
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain, read_metrics, signal_in_step

RANKS = 2


class Whole(NamedTuple):
    """An undisturbed run."""

    arguments: list[str]
    rows: list[tuple[Any, ...]]
    state: dict[str, torch.Tensor]
    lines: list[dict[str, int]]  # of each rank


def rows_of(output: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["samples"], row["loss"], row["grad_norm"]) for row in read_metrics(output)]


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint whose parameters are split over no rank."""
    shards = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    assert len(shards) == RANKS
    return {name: value for shard in shards for name, value in shard.items()}


def assert_same_state(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    state = state_of(checkpoint)
    assert state.keys() == expected.keys()
    assert [name for name, value in state.items() if not torch.equal(value, expected[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*TINY, f"--data={make_images(folder / 'images')}", "--steps=5", "--save_every=2", "--keep_last=2"]
    lines = run_ranks(RANKS, pretrain_counting_lines, [*arguments, f"--output_dir={folder / 'run'}"])
    assert all(rank[place] > 100 for rank in lines for place in PLACES)
    assert all(rank[BACKGROUND] == 0 for rank in lines)
    state = state_of(folder / "run/checkpoints/step_00000005")
    return Whole(arguments, rows_of(folder / "run"), state, lines)


@pytest.fixture(scope="module")
def background_lines(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Of each rank, by the threads that write while the same run goes on; the run itself is the undisturbed one."""
    output = tmp_path_factory.mktemp("background")
    lines = run_ranks(RANKS, pretrain_counting_lines, [*whole.arguments, f"--output_dir={output}", "--async_save"])
    assert rows_of(output) == whole.rows
    assert_same_state(output / "checkpoints/step_00000005", whole.state)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000005"]
    assert all(rank[BACKGROUND] > 100 for rank in lines)
    return [rank[BACKGROUND] for rank in lines]


def assert_continues(whole: Whole, output: Path) -> None:
    assert run_ranks(RANKS, pretrain, [*whole.arguments, f"--output_dir={output}"]) == [None] * RANKS
    assert rows_of(output) == whole.rows
    assert_same_state(output / "checkpoints/step_00000005", whole.state)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000005"]


@pytest.mark.parametrize("draw", [pytest.param(i, marks=pytest.mark.slow if i >= 3 else ()) for i in range(20)])
def test_a_run_killed_at_a_random_moment_continues_bit_for_bit(draw: int, whole: Whole, tmp_path: Path) -> None:
    random = np.random.default_rng(draw)
    place = ("save", "step")[draw % 2]
    victim = int(random.integers(RANKS))
    line = int(random.integers(1, whole.lines[victim][place] + 1))
    arguments = [*whole.arguments, f"--output_dir={tmp_path}"]
    with pytest.raises(AssertionError, match=f"rank {victim}:\nit ended without a result"):
        run_ranks(RANKS, pretrain_until_killed, arguments, place, line, victim)
    assert_continues(whole, tmp_path)


@pytest.mark.parametrize("draw", [pytest.param(i, marks=pytest.mark.slow if i >= 2 else ()) for i in range(20)])
def test_a_run_killed_while_it_writes_beside_the_training_continues_bit_for_bit(
    draw: int, whole: Whole, background_lines: list[int], tmp_path: Path
) -> None:
    random = np.random.default_rng(100 + draw)
    victim = draw % RANKS
    # how many lines are executed differs a little with the threads' turns
    line = int(random.integers(1, int(0.95 * background_lines[victim])))
    arguments = [*whole.arguments, f"--output_dir={tmp_path}", "--async_save"]
    with pytest.raises(AssertionError, match=f"rank {victim}:\nit ended without a result"):
        run_ranks(RANKS, pretrain_until_killed, arguments, BACKGROUND, line, victim)
    assert_continues(whole, tmp_path)


def test_a_stop_waits_for_the_checkpoint_beside_the_training(whole: Whole, tmp_path: Path) -> None:
    arguments = [*whole.arguments, f"--output_dir={tmp_path}", "--async_save"]
    for error in run_ranks(RANKS, pretrain, arguments, partial(signal_in_step, 3)):
        assert error.startswith(
            f"RunStopped: stopped by SIGTERM after step 3; saved {tmp_path}/checkpoints/step_00000003;"
        )
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000003"
    assert_continues(whole, tmp_path)


@pytest.mark.parametrize("mode", [(), ("--async_save",)], ids=["within the step", "in the background"])
def test_a_full_disk_on_one_rank_ends_the_run_and_keeps_the_checkpoint_before(
    mode: tuple[str, ...], whole: Whole, tmp_path: Path
) -> None:
    arguments = [*whole.arguments, f"--output_dir={tmp_path}", *mode]
    errors = run_ranks(RANKS, pretrain, arguments, partial(fill_disk_in_save, 2, 1))
    for error in errors:
        assert error.startswith("TrainingError: the checkpoint of step 4 could not be written (rank 1: "), error
        assert "File too large" in error
        assert f"continues from {tmp_path}/checkpoints/step_00000002" in error
        assert "\n" not in error
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert_continues(whole, tmp_path)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(whole: Whole, tmp_path: Path) -> None:
    arguments = [*whole.arguments, f"--output_dir={tmp_path / 'run'}"]
    assert run_ranks(RANKS, pretrain, arguments) == [None] * RANKS
    checkpoints = tmp_path / "run/checkpoints"
    flip_a_bit(newest := next((checkpoints / "step_00000005").glob("shard-00002-*")))

    error = run_ranks(1, pretrain, [*arguments, f"--resume={checkpoints / 'step_00000005'}"])[0]
    assert error.startswith(f"ConfigError: no checkpoint is intact ({newest} does not have the checksum")

    said = tmp_path / "said"
    assert run_ranks(RANKS, pretrain, arguments, partial(record_messages, said)) == [None] * RANKS
    assert f"warning: checkpoint passed over: {newest} does not have the checksum" in said.read_text()
    assert f"continuing {checkpoints}/step_00000004 at step 4" in said.read_text()
    assert rows_of(tmp_path / "run") == whole.rows
    assert_same_state(checkpoints / "step_00000005", whole.state)

    for state in checkpoints.glob("*/state.json"):
        state.write_text(state.read_text().replace('"samples": ', '"samples": 1'))
    error = run_ranks(1, pretrain, arguments)[0]
    assert "step_00000005/state.json was changed after it was written; " in error
    assert "step_00000004/state.json was changed after it was written" in error


def test_a_run_on_another_grid_says_what_changed(whole: Whole, tmp_path: Path) -> None:
    arguments = [*whole.arguments, f"--output_dir={tmp_path / 'run'}"]
    assert run_ranks(1, pretrain, [*arguments, "--steps=2"]) == [None]
    said = tmp_path / "said"
    changed = [*arguments, "--steps=3", "--micro_batch_size=2", "--tensor_parallel_size=2"]
    error = run_ranks(RANKS, pretrain, changed, partial(record_messages, said))[0]
    assert "holds another run (steps 2 there, 3 here)" in error
    changed += [f"--resume={tmp_path / 'run'}", f"--output_dir={tmp_path / 'longer'}"]
    assert run_ranks(RANKS, pretrain, changed, partial(record_messages, said)) == [None] * RANKS
    assert "resumed on another grid: tensor parallel 1 -> 2, micro-batch 4 -> 2\n" in said.read_text()


def test_checkpoints_of_round_steps_are_kept(whole: Whole, tmp_path: Path) -> None:
    arguments = [*whole.arguments, f"--output_dir={tmp_path}", "--save_every=1", "--keep_last=1", "--keep_every=2"]
    assert run_ranks(1, pretrain, arguments) == [None]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004", "step_00000005"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
