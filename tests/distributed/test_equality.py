"""Parallel equals serial: every grid computes what one rank without ZeRO computes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megatron_nepa.config import NepaObjective
from tests.distributed.cases import MODEL, Case, Outcome, differences, train_case
from tests.distributed.ranks import run_ranks

SERIAL: dict[str, Any] = {"zero_stage": 0, "micro_batch_size": 8}
PRIME = Case()  # T = 17
EVEN = replace(PRIME, model=replace(MODEL, bos_token=False, qk_norm="plain", mlp="gelu"))  # T = 16
NO_STOP_GRADIENT = replace(PRIME, objective=NepaObjective(stop_gradient=False))
NO_SHIFT = replace(PRIME, objective=NepaObjective(shift=False))
CASES = {"prime": PRIME, "even": EVEN, "no_stop_gradient": NO_STOP_GRADIENT, "no_shift": NO_SHIFT}


@cache
def serial(name: str) -> Outcome:
    outcome: Outcome = run_ranks(1, train_case, CASES[name].on(**SERIAL))[0]
    return outcome


def sp(**grid: Any) -> dict[str, Any]:
    return {"sequence_parallel": True, **grid}


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        # one rank: ZeRO and accumulation alone
        ("prime", {"zero_stage": 1, "micro_batch_size": 8}),
        ("prime", {"zero_stage": 2, "micro_batch_size": 2}),
        # data parallel
        ("prime", {"data_size": 2, "zero_stage": 0}),
        ("prime", {"data_size": 2, "zero_stage": 1, "micro_batch_size": 1}),
        ("prime", {"data_size": 2, "zero_stage": 2, "overlap_comm": True}),
        # buckets of a few parameters, some larger than a bucket
        ("prime", {"data_size": 2, "zero_stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000}),
        # tensor parallel: images shared out, and (micro-batch 1) not
        ("prime", {"tensor_size": 2, "zero_stage": 0}),
        ("prime", {"tensor_size": 2, "micro_batch_size": 1}),
        ("even", {"tensor_size": 4, "zero_stage": 1}),
        # sequence parallel: rows of whole samples, and rows that cut a sample, with padding (T prime) and without
        ("prime", sp(tensor_size=2, zero_stage=0)),
        ("prime", sp(tensor_size=2, micro_batch_size=1)),
        ("prime", sp(tensor_size=4, micro_batch_size=2, zero_stage=1)),
        ("even", sp(tensor_size=4, micro_batch_size=1)),
        ("prime", sp(tensor_size=2, activation_checkpointing="full")),
        # both
        ("prime", {"data_size": 2, "tensor_size": 2, "zero_stage": 1, "micro_batch_size": 1}),
        ("even", sp(data_size=2, tensor_size=2)),
        ("prime", sp(data_size=2, tensor_size=2, micro_batch_size=1, zero_stage=2)),
        # ablations, whose gradient takes the path through the target
        ("no_stop_gradient", sp(tensor_size=2, micro_batch_size=1)),
        ("no_stop_gradient", {"tensor_size": 2}),
        ("no_shift", sp(tensor_size=2, micro_batch_size=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items()),
)
def test_a_grid_computes_what_one_rank_computes(name: str, grid: dict[str, Any]) -> None:
    case = CASES[name].on(**grid)
    found = run_ranks(case.grid.world_size, train_case, case)[0]
    assert differences(found, serial(name)) == []


@pytest.mark.parametrize(
    ("name", "level", "grid"),
    [
        ("prime", "full", {}),
        ("prime", "selective", {}),
        ("even", "selective", {"tensor_size": 2}),
        ("prime", "selective", sp(tensor_size=2, micro_batch_size=1)),
    ],
)
def test_activation_checkpointing_changes_nothing(name: str, level: str, grid: dict[str, Any]) -> None:
    case = CASES[name].on(**grid)
    kept = run_ranks(case.grid.world_size, train_case, case)[0]
    recomputed = run_ranks(case.grid.world_size, train_case, CASES[name].on(**grid, activation_checkpointing=level))[0]
    assert kept.losses == recomputed.losses
    assert kept.grad_norms == recomputed.grad_norms
    for gradient, expected in ((recomputed.gradients, kept.gradients), (recomputed.state, kept.state)):
        assert gradient.keys() == expected.keys()
        assert all(torch.equal(gradient[key], value) for key, value in expected.items())


def test_bf16_grids_err_no_more_than_one_bf16_rank() -> None:
    exact = serial("prime")
    half = replace(PRIME, dtype="bf16")
    one = run_ranks(1, train_case, half.on(micro_batch_size=8))[0]
    for grid in (sp(tensor_size=2, data_size=2), {"tensor_size": 2, "zero_stage": 1}):
        case = half.on(**grid)
        many = run_ranks(case.grid.world_size, train_case, case)[0]
        assert many.replicas_equal
        for name, reference in exact.gradients.items():
            scale = reference.norm().item()
            error_of_one = (one.gradients[name] - reference).norm().item() / scale
            error_of_many = (many.gradients[name] - reference).norm().item() / scale
            # 2**-8 is one rounding of bf16: the sums over ranks round once more than one rank does
            assert error_of_many <= 2 * error_of_one + 2**-8, f"{grid} {name}: {error_of_many} and {error_of_one}"
        for a, b, c in zip(many.losses, one.losses, exact.losses, strict=True):
            assert abs(a - c) <= 2 * abs(b - c) + 2**-8 * abs(c) + 1e-3
