"""The model's forward and backward in fp64, without DeepSpeed: equal to one rank to 1e-11."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import ModelConfig, NepaObjective, ParallelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.parallel.parameters import layout_of
from megatron_nepa.parallel.topology import TensorGroup
from tests.distributed.cases import MODEL, SEED, sample_images, spread_vectors
from tests.distributed.ranks import run_ranks

EVEN = replace(MODEL, bos_token=False)
Layout = tuple[ModelConfig, NepaObjective, ParallelConfig, int]

LAYOUTS: list[Layout] = [
    (
        model,
        NepaObjective(stop_gradient=stop_gradient, mask_ratio=0.4),
        ParallelConfig(size, sequence_parallel, chunk_bytes=4096),  # 2 to 8 chunks
        batch,
    )
    for model in (MODEL, EVEN)
    for size in (2, 4)
    for sequence_parallel in (False, True)
    for batch in (1, 3, 4)
    for stop_gradient in (True, False)
]


def loss_and_gradients(layout: Layout, tensor: TensorGroup) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the samples and their mean, [batch + 1], and every gradient."""
    config, objective, parallel, batch = layout
    model = NepaForPretraining(config, objective, Build(parallel, tensor, seed=SEED))
    spread_vectors(model)
    model.double()
    share = batch // tensor.size if batch % tensor.size == 0 else batch
    first = tensor.rank * share if share < batch else 0
    images = sample_images(range(first, first + share), config, torch.float64)
    output = model(images, torch.arange(batch), by_sample=True)
    output.loss.backward()
    losses = torch.cat((output.sample_loss, output.loss.detach()[None]))
    return losses, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def compare_all(layouts: list[Layout]) -> list[str]:
    """Each layout on groups of its size among the ranks, against one rank; the problems found on this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = {size: [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)] for size in (2, 4)}
    problems = []
    for layout in layouts:
        size = layout[2].tensor_parallel_size
        tensor = TensorGroup(rank % size, size, groups[size][rank // size])
        losses, gradients = loss_and_gradients(layout, tensor)
        expected_losses, expected = loss_and_gradients((*layout[:2], ParallelConfig(), layout[3]), TensorGroup())
        if not (losses - expected_losses).abs().max() <= 1e-11 or not abs(losses[:-1].mean() - losses[-1]) <= 1e-11:
            problems.append(f"{layout[2:]} losses {losses} and {expected_losses}")
        if gradients.keys() != expected.keys():
            problems.append(f"{layout[2:]} gradients of {gradients.keys() ^ expected.keys()}")
        shards = shards_of(layout, expected, tensor)
        problems += [
            f"{layout[2:]} {name} differs by {(value - shards[name]).norm():.3g}"
            for name, value in gradients.items()
            if not (value - shards[name]).norm() <= 1e-11 * max(1.0, shards[name].norm().item())
        ]
    return problems


def shards_of(layout: Layout, whole: dict[str, Tensor], tensor: TensorGroup) -> dict[str, Tensor]:
    model = NepaForPretraining(*layout[:2], Build(layout[2], tensor, seed=SEED))
    layouts: dict[str, Any] = {name: layout_of(param) for name, param in model.named_parameters()}
    return {name: layouts[name].take_shard(value, tensor) for name, value in whole.items()}


def test_layers_equal_one_rank_in_fp64() -> None:
    problems = [problem for rank in run_ranks(4, compare_all, LAYOUTS) for problem in rank]
    assert problems == []


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_the_heads_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"tensor_parallel_size {size} does not divide model.num_heads 4"):
        ParallelConfig(size).check_model(MODEL)
