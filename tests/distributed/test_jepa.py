"""JEPA computes on every grid what one rank without ZeRO computes, and its targets are the average, whole and once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.training.engine.engine import TrainingEngine
from tests.distributed.cases import (
    LEARNING_RATE,
    Case,
    Mutation,
    Outcome,
    build_engine,
    differences,
    local_samples,
    sample_images,
    train_case,
)
from tests.distributed.jepa_cases import CASE, MUTATIONS
from tests.distributed.ranks import run_ranks
from tests.distributed.test_objectives import load_and_train, train_and_save, train_cases

CUT: dict[str, Any] = {"data_size": 2, "tensor_size": 2, "sequence_parallel": True, "micro_batch_size": 1}
GRIDS: list[dict[str, Any]] = [
    CUT,
    {"data_size": 2, "tensor_size": 2, "zero_stage": 1},
    # whole samples on each rank
    {"data_size": 2, "tensor_size": 2, "sequence_parallel": True, "activation_checkpointing": "full"},
    {"data_size": 4, "micro_batch_size": 1, "overlap_comm": True},
    {"data_size": 4, "micro_batch_size": 2, "zero_stage": 0},
]


@cache
def serial() -> Outcome:
    outcome: Outcome = run_ranks(1, train_case, CASE.on(zero_stage=0, micro_batch_size=8))[0]
    return outcome


def test_a_grid_computes_what_one_rank_computes() -> None:
    cases = [CASE.on(**grid) for grid in GRIDS]
    for grid, found in zip(GRIDS, run_ranks(4, train_cases, cases, [None] * len(cases))[0], strict=True):
        assert differences(found, serial()) == [], grid


# one of the average, one of the gather and two of the masks; the rest in the long suite
FIRST = (
    *("targets from the raw weights", "shards in the wrong place"),
    *("places keyed by the replica", "sizes by micro-batch"),
)


@pytest.mark.parametrize(
    "names", [FIRST, pytest.param(tuple(name for name in MUTATIONS if name not in FIRST), marks=pytest.mark.slow)]
)
def test_mistakes_are_seen(names: tuple[str, ...]) -> None:
    mutations: dict[str, Mutation | None] = {"none": None, **{name: MUTATIONS[name] for name in names}}
    outcomes = run_ranks(4, train_cases, [CASE.on(**CUT)] * len(mutations), list(mutations.values()))[0]
    seen = {mutation for mutation, found in zip(mutations, outcomes, strict=True) if differences(found, serial())}
    assert seen == set(names)


def test_a_run_that_continues_on_another_grid_computes_the_same(tmp_path: Path) -> None:
    run_ranks(4, train_and_save, CASE.on(**CUT), tmp_path)
    case = CASE.on(data_size=2, zero_stage=1)
    found = run_ranks(2, load_and_train, case, tmp_path / "step_00000001")[0]
    whole = serial()
    rest = Outcome(losses=whole.losses[1:], grad_norms=whole.grad_norms[1:], state=whole.state)
    assert differences(found, rest) == []


def shown(case: Case) -> dict[str, Tensor]:
    """This rank's rows of which the log shows the health."""
    engine, micro = build_engine(case), case.grid.micro_batch_size
    images = sample_images(local_samples(0, micro, engine.topology), case.model, torch.float32)
    rows: dict[str, Tensor] = engine.forward(images, torch.arange(micro), 0).embeddings
    return rows


def test_the_health_is_that_of_what_is_predicted() -> None:
    """Also where a rank's rows cut a sample, and are the context's in part."""
    whole: dict[str, Tensor] = run_ranks(1, shown, CASE.on(zero_stage=0, micro_batch_size=1))[0]
    parts = run_ranks(2, shown, CASE.on(tensor_size=2, sequence_parallel=True, zero_stage=0, micro_batch_size=1))
    for name, rows in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), rows, atol=1e-5, rtol=1e-4)


class GatherCount:
    """Counts the all-gathers that the copy starts."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self._real = dist.all_gather_into_tensor

    def __call__(self, output: Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("async_op"):
            self.bytes.append(output.numel() * output.element_size())
        return self._real(output, *arguments, **options)


def step_is_applied(engine: TrainingEngine, case: Case, step: int, factor: float) -> bool:
    """Make a step on images times ``factor``."""
    topology, micro = engine.topology, case.grid.micro_batch_size
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    for accumulation in range(engine.accumulation_steps):
        first = step * case.global_batch_size + (accumulation * topology.data_size + topology.data_rank) * micro
        images = sample_images(local_samples(first, micro, topology), case.model, dtype) * factor
        engine.backward(case.loss(engine, images, torch.arange(first, first + micro)))
        if accumulation < engine.accumulation_steps - 1:
            engine.end_micro_batch()
    return engine.step(LEARNING_RATE).applied


def follow(case: Case) -> None:
    """The copy is the average rounded to the weights' dtype, gathered once a step, and stays in a skipped one."""
    counter = GatherCount()
    engine = build_engine(case)
    copy = engine.average_copy
    assert copy is not None
    assert engine.ema is not None
    trunk = {name: p for name, p in engine.module.trunk.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    numbers = sum(param.numel() for param in trunk.values())
    # the trunk's weights in the run's dtype, padded to equal shards of two groups; nothing of the predictor
    assert copy.tensors.keys() == trunk.keys()
    assert 0 <= copy.flat.numel() - numbers <= 2 * 8 * case.grid.data_size
    assert copy.flat.dtype == (torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    dist.all_gather_into_tensor = counter  # type: ignore[assignment]
    for step, factor in enumerate((1.0, 1.0, float("nan"), 1.0)):
        applied = step_is_applied(engine, case, step, factor)
        assert applied == (factor == 1.0)
        copy.start()
        copy.wait()
        # two groups, once however many micro-batches: before the first step, and after each that was applied
        gathers = 0 if case.grid.zero_stage == 0 else 2 * ((step == 0) + applied)
        assert len(counter.bytes) == gathers, (step, counter.bytes)
        assert sum(counter.bytes) == gathers // 2 * copy.flat.numel() * copy.flat.element_size()
        counter.bytes.clear()
        with engine.averaged_weights():
            for name, param in trunk.items():
                assert torch.equal(copy.tensors[name], param), name


def follow_all(cases: Sequence[Case]) -> None:
    real = dist.all_gather_into_tensor
    for case in cases:
        follow(case)
        dist.all_gather_into_tensor = real


def test_the_copy_follows_the_average() -> None:
    grids: list[dict[str, Any]] = [
        {"data_size": 2, "micro_batch_size": 1},
        {"data_size": 2, "zero_stage": 1, "micro_batch_size": 2},
    ]
    halves = [replace(CASE, dtype="bf16").on(**grid) for grid in grids]
    run_ranks(2, follow_all, [*halves, CASE.on(data_size=2, zero_stage=0)])
