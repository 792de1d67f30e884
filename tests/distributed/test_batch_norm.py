"""BatchNorm over ranks in fp64: torch's BatchNorm2d on one rank, and the joined batch on several."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nepa.config import ConfigError
from megatron_nepa.parallel.batch_norm import BatchNorm
from tests.distributed.ranks import run_ranks

CHANNELS, BATCH, SIDE = 6, 8, 3


class Outcome(NamedTuple):
    """Of two training steps: outputs and input gradients of this rank's samples, weight gradients, statistics."""

    outputs: Tensor
    input_gradients: Tensor
    weight_gradients: Tensor  # [2, C]
    running: Tensor  # [2, C]
    evaluated: Tensor


def train(norm: nn.Module, samples: slice, offset: float = 100.0) -> Outcome:
    """Two steps of a loss that is no sum over samples' symmetric parts; ``offset`` makes a one-pass variance fail."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(CHANNELS, generator=generator))
        norm.bias.copy_(torch.randn(CHANNELS, generator=generator))
    outputs, gradients = [], []
    for _ in range(2):
        x = offset + torch.randn(BATCH, CHANNELS, SIDE, SIDE + 1, generator=generator, dtype=torch.float64)
        target = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        mine = x[samples].requires_grad_()
        output = norm(mine)
        ((output - target[samples]) ** 3).sum().backward()
        assert mine.grad is not None
        outputs.append(output.detach())
        gradients.append(mine.grad)
    return Outcome(
        torch.stack(outputs),
        torch.stack(gradients),
        torch.stack((norm.weight.grad, norm.bias.grad)),
        torch.stack((norm.running_mean, norm.running_var)),
        norm.eval()(x[samples]).detach(),
    )


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-11 * max(1.0, expected.norm().item()))


def test_one_rank_is_torch() -> None:
    found = train(BatchNorm(CHANNELS).double(), slice(None))
    expected = train(nn.BatchNorm2d(CHANNELS).double(), slice(None))
    for name, ours, theirs in zip(Outcome._fields, found, expected, strict=True):
        assert close(ours, theirs), name


def compare_with_one_rank() -> list[str]:
    """This rank's part of a joint run against the same part of a run alone; also with groups of half the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group([i for i in range(world) if i % 2 == half]) for half in range(2)]
    problems = []
    for group in (dist.group.WORLD, halves[rank % 2]):
        assert group is not None
        size, place = dist.get_world_size(group), dist.get_rank(group)
        mine = slice(place * BATCH // size, (place + 1) * BATCH // size)
        found = train(BatchNorm(CHANNELS, group).double(), mine)
        expected = train(BatchNorm(CHANNELS).double(), slice(None))
        summed = found.weight_gradients.clone()
        dist.all_reduce(summed, group=group)
        checks = {
            "outputs": close(found.outputs, expected.outputs[:, mine]),
            "input_gradients": close(found.input_gradients, expected.input_gradients[:, mine]),
            "weight_gradients": close(summed, expected.weight_gradients),
            "running": close(found.running, expected.running),
            "evaluated": close(found.evaluated, expected.evaluated[mine]),
        }
        problems += [f"{name} on {size} ranks" for name, good in checks.items() if not good]
    return problems


def test_ranks_are_one_batch() -> None:
    assert [problem for problems in run_ranks(4, compare_with_one_rank) for problem in problems] == []


def test_bf16_keeps_statistics_in_fp32() -> None:
    """Weights and activations are bf16; statistics are neither rounded nor computed in it."""
    norm = BatchNorm(CHANNELS).to(torch.bfloat16)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    assert norm.weight.dtype == torch.bfloat16
    x = 30 + torch.randn(BATCH, CHANNELS, 9, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    output = norm(x.requires_grad_())
    output.sum().backward()
    assert output.dtype == norm.weight.grad.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().float().mean((0, 2, 3)))
    expected = nn.functional.batch_norm(x.detach().float(), None, None, training=True)
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=1e-3)


def test_values_that_are_not_finite_leave_the_statistics() -> None:
    norm = BatchNorm(CHANNELS)
    x = torch.randn(2, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 2, 1, 1] = torch.inf
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    norm(x)
    assert norm.running_mean[2] == 0
    assert norm.running_var[2] == 1
    assert (norm.running_mean != 0).sum() == CHANNELS - 1


def test_a_single_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than one value a channel"):
        BatchNorm(CHANNELS)(torch.zeros(1, CHANNELS, 1, 1))
