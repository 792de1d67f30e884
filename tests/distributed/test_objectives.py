"""Parallel equals serial for every objective: each grid, a resumed run on another grid, and mistakes that must show.

Ranks are started once for several cases: a mutation is undone after its case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import load
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.config import AimObjective, MaeObjective
from megatron_nepa.models import draws, patch_embedding, stack, transformer, trunk
from megatron_nepa.objectives import aim, block_masks, jepa, mae, pixels, predictor
from megatron_nepa.parallel.collectives import gather_rows
from megatron_nepa.parallel.rows import RowShard
from megatron_nepa.parallel.topology import TensorGroup, Topology
from megatron_nepa.training.engine import engine as engine_module
from tests.distributed.cases import (
    MODEL,
    Case,
    Mutation,
    Outcome,
    build_engine,
    build_run,
    differences,
    join_state,
    train_case,
    train_step,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.test_mutations import draw_keyed_by_rank, drop_gradient_sum

MAE = MaeObjective(decoder_hidden_size=32, decoder_layers=2, decoder_heads=4, decoder_mlp_hidden_size=48)
CASES = {
    "aim": Case(objective=AimObjective(head_layers=2), steps=2),
    # 4 of 16 patches and the BOS token: 5 tokens of the trunk, 17 of the decoder
    "mae": Case(objective=MAE, model=replace(MODEL, causal=False, position_embedding="sincos"), steps=2),
}
CUT: dict[str, Any] = {"tensor_size": 2, "sequence_parallel": True, "micro_batch_size": 1}
GRIDS: list[dict[str, Any]] = [
    {**CUT, "data_size": 2},
    {"data_size": 2, "tensor_size": 2, "zero_stage": 1},
    {"tensor_size": 4, "sequence_parallel": True, "activation_checkpointing": "full"},
    {"data_size": 4, "micro_batch_size": 1},
]
PATCHED = (
    *(draws, patch_embedding, stack, transformer, trunk, pixels, mae, aim),
    *(block_masks, jepa, predictor, engine_module),  # by jepa_cases
)


def train_cases(cases: Sequence[Case], mutations: Sequence[Mutation | None]) -> list[Outcome]:
    outcomes = []
    for case, mutation in zip(cases, mutations, strict=True):
        kept = [(module, dict(vars(module))) for module in PATCHED]
        outcomes.append(train_case(case, mutation))
        for module, names in kept:
            vars(module).update(names)
    return outcomes


@cache
def all_serial() -> list[Outcome]:
    cases = [case.on(zero_stage=0, micro_batch_size=8) for case in CASES.values()]
    outcomes: list[Outcome] = run_ranks(1, train_cases, cases, [None] * len(cases))[0]
    return outcomes


def serial(name: str) -> Outcome:
    return all_serial()[list(CASES).index(name)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_grid_computes_what_one_rank_computes(name: str) -> None:
    cases = [CASES[name].on(**grid) for grid in GRIDS]
    for grid, found in zip(GRIDS, run_ranks(4, train_cases, cases, [None] * len(cases))[0], strict=True):
        assert differences(found, serial(name)) == [], grid


def train_and_save(case: Case, folder: Path) -> None:
    engine = build_engine(case)
    train_step(engine, case, 0)
    progress = Progress(1, case.global_batch_size, 1)
    CheckpointStore(folder, keep_last=1).save(
        engine.train_state, progress, engine.zero_stage, build_run(case).to_dict()
    )


def train_and_save_all(folder: Path) -> None:
    for name, case in CASES.items():
        train_and_save(case.on(**CUT), folder / name)


def load_and_train_all(folder: Path) -> list[Outcome]:
    grid: dict[str, Any] = {"zero_stage": 1, "micro_batch_size": 4}
    return [load_and_train(case.on(**grid), folder / name / "step_00000001") for name, case in CASES.items()]


def load_and_train(case: Case, checkpoint: Path) -> Outcome:
    engine = build_engine(case)
    progress = load(engine.train_state, checkpoint, read_manifest(checkpoint), build_run(case).to_dict())
    engine.applied_steps = progress.applied_steps
    outcome = Outcome()
    for step in range(1, case.steps):
        loss, norm = train_step(engine, case, step)
        outcome.losses.append(loss)
        outcome.grad_norms.append(norm)
    outcome.state = join_state(engine)
    return outcome


def test_a_run_that_continues_on_another_grid_computes_the_same(tmp_path: Path) -> None:
    run_ranks(2, train_and_save_all, tmp_path)
    for name, found in zip(CASES, run_ranks(1, load_and_train_all, tmp_path)[0], strict=True):
        whole = serial(name)
        rest = Outcome(losses=whole.losses[1:], grad_norms=whole.grad_norms[1:], state=whole.state)
        assert differences(found, rest) == [], name


def unsummed_rows(model: nn.Module, topology: Topology) -> None:
    """The encoded rows that each rank uses a share of get that share's gradient alone."""
    mae.join_rows = lambda own, num_rows, tensor: gather_rows(own, tensor)[:num_rows]  # type: ignore[assignment]


def own_masks(model: nn.Module, topology: Topology) -> None:
    """Each rank weighs the rows of the whole replica as if its own came first."""
    real = mae.shard_rows

    def mutated(num_rows: int, tensor: TensorGroup, sequence_parallel: bool) -> RowShard:
        return replace(real(num_rows, tensor, sequence_parallel), first=0)

    mae.shard_rows = mutated  # type: ignore[assignment]


def loss_of_the_micro_batch(model: nn.Module, topology: Topology) -> None:
    """A mean over the predicted patches of a micro-batch, of whichever samples meet in it."""
    real = aim.pixel_loss

    def mutated(prediction: Tensor, target: Tensor, weight: Tensor, trunk: Any) -> tuple[Tensor, Tensor]:
        counts = (weight > 0).to(weight.dtype)
        total = counts.sum()
        torch.distributed.all_reduce(total, group=topology.tensor.group)
        return real(prediction, target, counts / total, trunk)

    aim.pixel_loss = mutated


MUTATIONS: dict[str, dict[str, Mutation]] = {
    "aim": {
        "prefix keyed by rank": partial(draw_keyed_by_rank, "prefix"),
        "loss of the micro-batch": loss_of_the_micro_batch,
        "gradient sum of the head's norms": partial(drop_gradient_sum, "pixel_head.norms"),
        "gradient sum of the pixels' layer": partial(drop_gradient_sum, "pixel_head.predict.weight"),
    },
    "mae": {
        "mask keyed by rank": partial(draw_keyed_by_rank, "mae_mask"),
        "gradient sum of the encoded rows": unsummed_rows,
        "gradient sum of the decoder's mask token": partial(drop_gradient_sum, "pixel_decoder.mask_token"),
        "gradient sum of the decoder's first layer": partial(drop_gradient_sum, "pixel_decoder.embed.weight"),
        "rows of rank 0 everywhere": own_masks,
    },
}


# of the default suite; each objective's others are slow
QUICK = {"aim": "prefix keyed by rank", "mae": "gradient sum of the encoded rows"}


def seen_mistakes(mistakes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the objectives' mutations, or "none", that change what two ranks compute."""
    mutations = [None if mistake == "none" else MUTATIONS[name][mistake] for name, mistake in mistakes]
    cases = []
    for (name, _), mutation in zip(mistakes, mutations, strict=True):
        # of one sample, a micro-batch's mean is its own
        alone = {} if mutation is not loss_of_the_micro_batch else {"micro_batch_size": 4}
        cases.append(CASES[name].on(**{**CUT, **alone}))
    outcomes = run_ranks(2, train_cases, cases, mutations)[0]
    return [
        (name, mistake)
        for (name, mistake), found in zip(mistakes, outcomes, strict=True)
        if differences(found, serial(name))
    ]


def test_a_mistake_of_each_objective_is_seen() -> None:
    mistakes = list(QUICK.items())
    assert seen_mistakes([*((name, "none") for name in CASES), *mistakes]) == mistakes


@pytest.mark.slow
def test_all_other_mistakes_are_seen() -> None:
    mistakes = [(name, mistake) for name in CASES for mistake in MUTATIONS[name] if mistake != QUICK[name]]
    assert seen_mistakes(mistakes) == mistakes
