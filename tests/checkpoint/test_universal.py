"""DeepSpeed's own loader reads what we export, and what it continues comes back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_nepa.checkpoint.conversion.universal import export_universal, import_universal, is_universal
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import load
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.config import ConfigError
from tests.distributed.cases import MODEL, Case, Grid, build_engine, build_run, join_state, local_samples, sample_images
from tests.distributed.ranks import run_ranks

MASKED = replace(MODEL, num_layers=1)
SOURCE = Case(grid=Grid(data_size=2, tensor_size=2, sequence_parallel=True), model=MASKED)
STEPS = 2


def train_and_save(folder: Path) -> dict[str, Tensor]:
    engine = build_engine(SOURCE)
    topology = engine.topology
    for step in range(STEPS):
        first = step * SOURCE.global_batch_size + topology.data_rank * 4
        images = sample_images(local_samples(first, 4, topology), MASKED, torch.float32)
        engine.backward(engine.forward(images, torch.arange(first, first + 4)).loss)
        assert engine.step(1e-3).applied
    store = CheckpointStore(folder, keep_last=1)
    store.save(engine.train_state, Progress(STEPS + 1, 24, STEPS), engine.zero_stage, build_run(SOURCE).to_dict())
    return join_state(engine)


def load_with_deepspeed(case: Case, folder: Path) -> tuple[dict[str, Tensor], list[Any]]:
    engine = build_engine(case)
    engine.deepspeed._config.load_universal_checkpoint = True
    path, _ = engine.deepspeed.load_checkpoint(str(folder))
    assert path is not None
    assert engine.deepspeed.global_steps == STEPS + 1
    masters = engine.masters
    counts = [float(masters.optimizer.state[flat]["step"]) for flat in masters.flats]
    state = join_state(engine)
    for name, param in engine.module.named_parameters():
        if case.grid.tensor_size == 1:
            assert torch.equal(param.detach().flatten(), state[f"master.{name}"].flatten()), name
    return state, counts


def load_ours(checkpoint: Path) -> tuple[dict[str, Tensor], Progress]:
    engine = build_engine(Case(model=MASKED))
    run = build_run(Case(model=MASKED)).to_dict()
    progress = load(engine.train_state, checkpoint, read_manifest(checkpoint), run)
    return join_state(engine), progress


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("universal")
    state = run_ranks(4, train_and_save, folder / "run")[0]
    assert export_universal(folder / "run", folder / "universal").name == "step_00000003"
    return folder / "universal", state


@pytest.mark.parametrize("grid", [Grid(zero_stage=1), Grid(tensor_size=2)], ids=["one rank, ZeRO 1", "TP 2, ZeRO 2"])
def test_deepspeed_loads_masters_and_moments(grid: Grid, exported: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = exported
    case = Case(grid=grid, model=MASKED)
    state, counts = run_ranks(grid.world_size, load_with_deepspeed, case, folder)[0]
    assert counts == [STEPS] * len(counts)
    kinds = ("master.", "exp_avg.", "exp_avg_sq.")
    names = [name for name in expected if name.startswith(kinds)]
    assert any(expected[name].any() for name in names if name.startswith("exp_avg_sq."))
    assert [name for name in names if not torch.equal(state[name], expected[name])] == []


def test_an_export_comes_back_whole(exported: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, expected = exported
    assert is_universal(folder)
    assert import_universal(folder, tmp_path / "back") == f"step 3 of {folder}/global_step3"
    state, progress = run_ranks(1, load_ours, tmp_path / "back")[0]
    assert progress == Progress(STEPS + 1, 24, STEPS)
    assert state.keys() == expected.keys()
    assert [name for name, value in state.items() if not torch.equal(value, expected[name])] == []


def test_steps_trained_elsewhere_move_the_data_on(exported: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    export_universal(exported[0].parent / "run", tmp_path / "universal")
    for path in (tmp_path / "universal").glob("*/zero/*/step.pt"):
        torch.save(5, path)
    assert "the weight average starts anew" in import_universal(tmp_path / "universal", tmp_path / "back")
    manifest = json.loads((tmp_path / "back/state.json").read_text())
    assert manifest["progress"] == dataclasses.asdict(Progress(step=6, samples=48, applied_steps=5))


def test_a_file_that_runs_code_is_refused(exported: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    export_universal(exported[0].parent / "run", tmp_path / "universal")
    path = next((tmp_path / "universal").glob("*/zero/trunk.norm.weight/fp32.pt"))
    torch.save({"param": torch.zeros(64), "extra": Path("anything")}, path)
    with pytest.raises(ConfigError, match=r"fp32.pt is refused: it cannot be loaded without running code"):
        import_universal(tmp_path / "universal", tmp_path / "back")
    assert not (tmp_path / "back").exists()
