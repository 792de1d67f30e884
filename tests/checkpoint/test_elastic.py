"""A checkpoint of one grid is read on any other, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import load
from megatron_nepa.config import ConfigError
from tests.checkpoint.test_universal import MASKED, SOURCE, STEPS, train_and_save
from tests.distributed.cases import Case, Grid, build_engine, build_run, join_state
from tests.distributed.ranks import run_ranks


def order_of(checkpoint: Path, recorded: int | None) -> int | str:
    """The order that a run continues in whose manifest holds ``recorded``, or why it does not."""
    case, manifest = Case(grid=Grid(), model=MASKED), read_manifest(checkpoint)
    manifest["progress"].pop("order")
    if recorded is not None:
        manifest["progress"]["order"] = recorded
    try:
        return load(build_engine(case).train_state, checkpoint, manifest, build_run(case).to_dict()).order
    except ConfigError as error:
        return str(error)


def load_on(grid: Grid, checkpoint: Path) -> tuple[dict[str, Tensor], list[float]]:
    case = Case(grid=grid, model=MASKED)
    engine = build_engine(case)
    progress = load(engine.train_state, checkpoint, read_manifest(checkpoint), build_run(case).to_dict())
    assert (progress.step, progress.samples, progress.applied_steps) == (STEPS + 1, 24, STEPS)
    masters = engine.masters
    return join_state(engine), [float(masters.optimizer.state[flat]["step"]) for flat in masters.flats]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Of TP 2 x DP 2 with sequence parallelism and ZeRO 2, after two steps."""
    assert (SOURCE.grid.data_size, SOURCE.grid.tensor_size, SOURCE.grid.zero_stage) == (2, 2, 2)
    folder = tmp_path_factory.mktemp("elastic")
    return folder / "step_00000003", run_ranks(4, train_and_save, folder)[0]


@pytest.mark.parametrize(
    "grid",
    [Grid(), Grid(data_size=4, micro_batch_size=2), Grid(tensor_size=4, zero_stage=1), Grid(zero_stage=0)],
    ids=["one rank", "DP 4", "TP 4, ZeRO 1", "ZeRO 0"],
)
def test_masters_moments_and_average_are_equal_after_gathering(
    grid: Grid, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    checkpoint, expected = saved
    state, counts = run_ranks(grid.world_size, load_on, grid, checkpoint)[0]
    assert counts == [STEPS] * len(counts)
    assert state.keys() == expected.keys()
    unequal = [name for name, value in state.items() if not torch.equal(value, expected[name])]
    assert unequal == []
    average = [name for name in state if name.startswith("ema.")]
    assert any(not torch.equal(state[name], state[name.replace("ema.", "master.")]) for name in average)


@pytest.mark.parametrize(("recorded", "continued"), [(None, 1), (1, 1), (2, 2)])
def test_a_run_keeps_its_order(recorded: int | None, continued: int, saved: tuple[Path, dict[str, Tensor]]) -> None:
    assert run_ranks(1, order_of, saved[0], recorded) == [continued]


def test_a_run_of_an_unknown_order_is_not_continued(saved: tuple[Path, dict[str, Tensor]]) -> None:
    (refusal,) = run_ranks(1, order_of, saved[0], 3)
    assert refusal.startswith(f"{saved[0]} is of a run whose images come in order version 3; this release knows")
