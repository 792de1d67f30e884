"""Buffers that a module counts as its state (BatchNorm's running statistics) are saved, restored and converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_nepa.checkpoint.conversion.inspect import describe
from megatron_nepa.checkpoint.conversion.universal import export_universal, import_universal
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.format.state import persistent_buffers
from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.reading.resume import load
from megatron_nepa.checkpoint.reading.weights import consolidate, read_weights, stored_tensors, write_weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine.engine import TrainingEngine
from tests.distributed.cases import MODEL, Case, Grid, build_engine, build_run, join_state
from tests.distributed.ranks import run_ranks

CASE = Case(grid=Grid(data_size=2, tensor_size=2, sequence_parallel=True), model=replace(MODEL, num_layers=1))
EXPECTED = {
    "decode_head.running_mean": torch.tensor([0.0, 1.0, 2.0]) / 3,
    "decode_head.running_var": torch.full((3,), 7.0),
    "decode_head.num_batches_tracked": torch.tensor(2**40 + 1),  # more than fp32 can count
}


def add_head(model: nn.Module, topology: Topology) -> None:
    """A norm with statistics, and a buffer that is no state."""
    model.decode_head = nn.BatchNorm1d(3)
    model.decode_head.register_buffer("scratch", torch.ones(2), persistent=False)


def build(case: Case) -> TrainingEngine:
    return build_engine(case, add_head)


def save_with_statistics(folder: Path, case: Case) -> dict[str, Tensor]:
    """Write a checkpoint; only the main rank has :data:`EXPECTED`."""
    engine = build(case)
    head = engine.module.decode_head
    head.running_mean.copy_(torch.arange(3) / 3 + engine.topology.rank)
    head.running_var.fill_(7.0)
    head.num_batches_tracked.fill_(2**40 + 1)
    CheckpointStore(folder, keep_last=1).save(
        engine.train_state, Progress(7, 56, 6), engine.zero_stage, build_run(case).to_dict()
    )
    return join_state(engine)


def load_on(case: Case, checkpoint: Path) -> dict[str, Tensor]:
    engine = build(case)
    load(engine.train_state, checkpoint, read_manifest(checkpoint), build_run(case).to_dict())
    return persistent_buffers(engine.module)


def start_on(case: Case, path: Path) -> dict[str, Tensor]:
    engine = build(case)
    start_from(engine.train_state, str(path), "ema", case.model)
    return persistent_buffers(engine.module)


def assert_expected(found: dict[str, Tensor]) -> None:
    assert found.keys() == EXPECTED.keys()
    for name, value in EXPECTED.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Of TP 2 x DP 2 with sequence parallelism."""
    folder = tmp_path_factory.mktemp("buffers")
    return folder / "step_00000007", run_ranks(4, save_with_statistics, folder, CASE)[0]


@pytest.mark.parametrize(
    "case",
    [CASE.on(), CASE.on(tensor_size=2, zero_stage=1), replace(CASE.on(), dtype="bf16")],
    ids=["1", "TP 2", "bf16"],
)
def test_every_grid_restores_the_main_ranks_buffers(case: Case, saved: tuple[Path, dict[str, Tensor]]) -> None:
    for buffers in run_ranks(case.grid.world_size, load_on, case, saved[0]):
        assert_expected(buffers)


def test_each_is_written_once(saved: tuple[Path, dict[str, Tensor]]) -> None:
    keys = [key for path in saved[0].glob("*.safetensors") for key in load_file(path) if key.startswith("buffer.")]
    assert sorted(keys) == sorted(f"buffer.{name}" for name in EXPECTED)
    assert "buffer 7" in describe(saved[0])


def test_they_go_where_the_weights_go(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    weights = read_weights(saved[0])
    assert_expected(weights.buffers)
    assert not weights.tensors.keys() & EXPECTED.keys()
    write_weights(weights, tmp_path / "start")
    for path in (saved[0], tmp_path / "start"):
        for buffers in run_ranks(2, start_on, CASE.on(tensor_size=2), path):
            assert_expected(buffers)
    consolidate(weights, tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    assert_expected({name: one.pop(name) for name in EXPECTED})
    assert one.keys() == weights.tensors.keys()


def test_the_universal_layout_keeps_head_and_buffers(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    export_universal(saved[0], tmp_path / "universal")
    import_universal(tmp_path / "universal", tmp_path / "back")
    back, there = stored_tensors(tmp_path / "back"), stored_tensors(saved[0])
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in there.items()}
    assert "exp_avg.decode_head.weight" in back
    assert_expected(run_ranks(1, load_on, CASE.on(), tmp_path / "back")[0])
