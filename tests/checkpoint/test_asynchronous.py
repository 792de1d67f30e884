"""A checkpoint written while training goes on is that of its step, complete or absent; a failure is every rank's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from megatron_nepa.checkpoint.format import state
from megatron_nepa.checkpoint.format.manifest import verify_files
from megatron_nepa.checkpoint.format.masters import view_fragment
from megatron_nepa.checkpoint.saving.asynchronous import CheckpointSaver
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress, SaveError
from megatron_nepa.training.engine.engine import TrainingEngine
from tests.checkpoint.test_buffers import add_head
from tests.distributed.cases import MODEL, Case, Grid, build_engine, build_run, local_samples, sample_images
from tests.distributed.ranks import run_ranks

CASE = Case(model=replace(MODEL, num_layers=1, freeze_patch_embedding=True))


def train_step(engine: TrainingEngine, step: int) -> None:
    """One optimizer step, and a change of the buffers as BatchNorm makes it."""
    topology, micro = engine.topology, engine.run.micro_batch_size
    for accumulation in range(engine.accumulation_steps):
        first = step * 8 + (accumulation * topology.data_size + topology.data_rank) * micro
        images = sample_images(local_samples(first, micro, topology), CASE.model, torch.float32)
        engine.backward(engine.forward(images, torch.arange(first, first + micro)).loss)
        if accumulation < engine.accumulation_steps - 1:
            engine.end_micro_batch()
    assert engine.step(1e-2).applied
    engine.module.decode_head.running_mean += 1


def hold_writing() -> threading.Event:
    """Let torch write nothing before the event is set."""
    go, real = threading.Event(), HuggingFaceStorageWriter.write_data

    def write_data(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        assert go.wait(60)
        return real(self, *arguments)

    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
    return go


def save_while_training(case: Case, folder: Path, mutation: Callable[[], None] | None = None) -> None:
    """Save one step within it and in the background, while the steps after it are made."""
    engine = build_engine(case, add_head)
    train_step(engine, 0)
    arguments = engine.train_state, Progress(1, 8, 1), engine.zero_stage, build_run(case).to_dict()
    CheckpointStore(folder / "sync", keep_last=1).save(*arguments)

    if mutation is not None:
        mutation()
    go = hold_writing()
    saver = CheckpointSaver(CheckpointStore(folder / "async", keep_last=1), engine.topology, in_background=True)
    assert saver.wait() is None
    saver.save(*arguments)
    for step in (1, 2):
        train_step(engine, step)
        assert saver.finished() is None
    assert saver.store.latest() is None
    go.set()
    saved = saver.wait()
    assert saved is not None
    assert saved.path == saver.store.latest() == folder / "async/step_00000001"
    assert saver.finished() is None


def tensors_of(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    """Every tensor, or part of one, by file and key."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {(path.name, key): value for path in files for key, value in load_file(path).items()}


def differing(folder: Path) -> list[str]:
    """Tensors of the background checkpoint that are not those of the one within the step."""
    sync, background = (tensors_of(folder / kind / "step_00000001") for kind in ("sync", "async"))
    assert sync.keys() == background.keys()
    return [place[1] for place, value in sync.items() if not value.equal(background[place])]


@pytest.mark.parametrize(
    "grid",
    [Grid(zero_stage=0), Grid(data_size=2, tensor_size=2, sequence_parallel=True)],
    ids=["ZeRO 0", "TP 2 x DP 2"],
)
def test_the_files_are_those_of_the_step(grid: Grid, tmp_path: Path) -> None:
    run_ranks(grid.world_size, save_while_training, replace(CASE, grid=grid), tmp_path)
    assert differing(tmp_path) == []
    verify_files(tmp_path / "async/step_00000001")
    manifests = [json.loads((tmp_path / kind / "step_00000001/state.json").read_text()) for kind in ("sync", "async")]
    for manifest in manifests:
        del manifest["checksum"], manifest["files"]  # torch orders the tensors in a file by chance
    assert manifests[0] == manifests[1]


def alias_the_run() -> None:
    """Hand over the run's own tensors instead of a copy."""

    def view(param: Tensor, fragment: Any, flats: list[Tensor], *_: Any) -> Tensor:
        return view_fragment(flats, fragment).view(param.shape)

    state.join_fragments = view
    state._to_host = Tensor.detach


def test_a_checkpoint_without_a_copy_is_noticed(tmp_path: Path) -> None:
    run_ranks(1, save_while_training, replace(CASE, grid=Grid(zero_stage=0)), tmp_path, alias_the_run)
    kinds = {key.partition(".")[0] for key in differing(tmp_path)}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema", "buffer"}


def fail_to_write(folder: Path) -> tuple[int, str]:
    """Save twice in the background, the second time on a disk that fails rank 1."""
    engine = build_engine(replace(CASE, grid=Grid(data_size=2)), add_head)
    saver = CheckpointSaver(CheckpointStore(folder, keep_last=1), engine.topology, in_background=True)
    rest = engine.zero_stage, {}
    saver.save(engine.train_state, Progress(1, 8, 1), *rest)
    assert saver.wait() is not None

    def write_data(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        raise OSError("No space left on device")

    if engine.topology.rank == 1:
        HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
    saver.save(engine.train_state, Progress(2, 16, 2), *rest)
    for looks in range(1000):
        try:
            assert saver.finished() is None
        except SaveError as error:
            if engine.topology.is_main:
                assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001"]
            saver.save(engine.train_state, Progress(2, 16, 2), *rest)  # the saver serves on
            return looks, str(error)
    raise AssertionError("it was never said")


def test_a_failed_write_is_raised_on_every_rank_at_the_same_moment(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_to_write, tmp_path)
    assert first == second
    assert first[1].startswith("the checkpoint of step 2 could not be written (rank 1: No space left on device)")
    assert f"continues from {tmp_path}/step_00000001" in first[1]
    verify_files(tmp_path / "step_00000001")
