"""The equality suite can see: each known way to get a parallel run wrong makes the comparison fail."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_nepa.kernels.cosine_loss.reference import cosine_loss_reference
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models import draws, patch_embedding, stack, transformer, trunk
from megatron_nepa.objectives import aim, mae, pixels
from megatron_nepa.parallel.parameters import sum_split_gradients
from megatron_nepa.parallel.rows import RowShard
from megatron_nepa.parallel.topology import TensorGroup, Topology
from tests.distributed.cases import Case, Mutation, Outcome, differences, train_case
from tests.distributed.ranks import run_ranks

CUT_ROWS = Case(steps=2).on(tensor_size=2, sequence_parallel=True, micro_batch_size=1)


def drop_gradient_sum(part: str, model: nn.Module, topology: Topology) -> None:
    """Leave the gradients of the parameters whose name contains ``part`` unsummed over the tensor-parallel ranks."""
    skipped = {id(param) for name, param in model.named_parameters() if part in name}
    assert skipped, part

    def mutated(
        parameters: Sequence[Tensor | None], split: Collection[str], tensor: TensorGroup
    ) -> list[Tensor | None]:
        summed = sum_split_gradients(parameters, split, tensor)
        return [old if id(old) in skipped else new for old, new in zip(parameters, summed, strict=True)]

    for module in (transformer, stack, patch_embedding, pixels, mae, aim):
        module.sum_split_gradients = mutated  # type: ignore[attr-defined]


def rope_offset(model: nn.Module, topology: Topology) -> None:
    real = trunk.rope_angles
    shift = topology.tensor.rank
    trunk.rope_angles = lambda *arguments: real(*arguments).roll(shift, 0)  # type: ignore[assignment]


def wrong_halo(model: nn.Module, topology: Topology) -> None:
    real = RowShard.take

    def mutated(self: RowShard, rows: Tensor, halo: int = 0) -> Tensor:
        taken = real(self, rows, halo)
        return torch.cat((taken[:-1], taken[:1])) if halo else taken

    RowShard.take = mutated  # type: ignore[method-assign]


def missing_flag(model: nn.Module, topology: Topology) -> None:
    model.trunk.blocks[0].attention.qkv.weight.tensor_model_parallel = False  # type: ignore[union-attr, index]


def extra_flag(model: nn.Module, topology: Topology) -> None:
    model.trunk.embedding.weight.tensor_model_parallel = True  # type: ignore[union-attr]


def draw_keyed_by_rank(purpose: str, model: nn.Module, topology: Topology) -> None:
    real = draws.derive_key

    def mutated(seed: int, name: str, layer: int = 0) -> int:
        return real(seed + topology.tensor.rank if name == purpose else seed, name, layer)

    draws.derive_key = mutated


def padded_row_in_the_loss(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """As the true loss, but the rows past the end count as a further sample's."""
    target = torch.where((target == 0).all(-1, keepdim=True), torch.ones_like(target), target)
    return cosine_loss_reference(prediction, target, shift, skip, period, first_row, num_rows + period)


MUTATIONS: dict[str, Callable[[nn.Module, Topology], None]] = {
    "gradient sum of the block norms": partial(drop_gradient_sum, "norm2"),
    "gradient sum of the seam norms": partial(drop_gradient_sum, "norm1"),
    "gradient sum of the final norm": partial(drop_gradient_sum, "trunk.norm"),
    "gradient sum of the QK-norm": partial(drop_gradient_sum, "q_norm"),
    "gradient sum of row-parallel biases": partial(drop_gradient_sum, "out.bias"),
    "gradient sum of LayerScale": partial(drop_gradient_sum, "layer_scale"),
    "gradient sum of the patch embedding": partial(drop_gradient_sum, "embedding.weight"),
    "gradient sum of the BOS token": partial(drop_gradient_sum, "bos_token"),
    "gradient sum of the positions": partial(drop_gradient_sum, "positions"),
    "gradient sum of the mask token": partial(drop_gradient_sum, "mask_token"),
    "RoPE position offset on rank 1": rope_offset,
    "halo target": wrong_halo,
    "tensor_model_parallel missing": missing_flag,
    "tensor_model_parallel extra": extra_flag,
    "DropPath keyed by rank": partial(draw_keyed_by_rank, "drop_path"),
    "mask keyed by rank": partial(draw_keyed_by_rank, "patch_mask"),
    "RoPE rescale keyed by rank": partial(draw_keyed_by_rank, "rope_rescale"),
}


@cache
def serial() -> Outcome:
    outcome: Outcome = run_ranks(1, train_case, CUT_ROWS.on(zero_stage=0, micro_batch_size=8))[0]
    return outcome


def found_by_the_suite(case: Case, mutation: Mutation | None, **options: Any) -> list[str]:
    return differences(run_ranks(2, train_case, case, mutation, *options.values())[0], serial())


def test_without_a_mutation_the_comparison_passes() -> None:
    assert found_by_the_suite(CUT_ROWS, None) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_under_sequence_parallelism_is_seen(name: str) -> None:
    assert found_by_the_suite(CUT_ROWS, MUTATIONS[name])


def test_a_padded_row_in_the_loss_is_seen() -> None:
    assert found_by_the_suite(CUT_ROWS, None, kernels=Kernels(cosine_loss=padded_row_in_the_loss))


@pytest.mark.parametrize("part", ["q_norm", "embedding.weight", "bos_token"])
def test_a_dropped_sum_without_sequence_parallelism_is_seen(part: str) -> None:
    """Each rank uses the QK-norm on its own heads and embeds its own images even where it keeps all rows."""
    case = CUT_ROWS.on(tensor_size=2, micro_batch_size=4)
    assert found_by_the_suite(case, partial(drop_gradient_sum, part))
