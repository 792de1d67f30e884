"""The documentation's example of an objective trains, on two ranks as on one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import ParallelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.parallel.topology import TensorGroup
from tests.distributed.cases import MODEL, SEED, sample_images
from tests.distributed.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs/objectives.md"
BATCH = 3  # which two ranks cannot share: rows cut a sample


def loss_and_gradient(parallel: ParallelConfig, tensor: TensorGroup) -> tuple[float, Tensor]:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec", dont_inherit=True), names)
    model = names["ColourForPretraining"](MODEL, Build(parallel, tensor, seed=SEED)).double()
    loss = model(sample_images(range(BATCH), MODEL, torch.float64), torch.arange(BATCH)).loss
    loss.backward()
    return loss.item(), model.colour_head.weight.grad


def on_two_ranks() -> tuple[float, Tensor]:
    tensor = TensorGroup(dist.get_rank(), 2, dist.group.WORLD)
    return loss_and_gradient(ParallelConfig(2, sequence_parallel=True), tensor)


def test_the_example_computes_on_two_ranks_what_it_does_on_one() -> None:
    loss, gradient = loss_and_gradient(ParallelConfig(), TensorGroup())
    assert gradient.abs().max() > 0
    for other_loss, other_gradient in run_ranks(2, on_two_ranks):
        assert abs(other_loss - loss) < 1e-12
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-10, atol=1e-12)
