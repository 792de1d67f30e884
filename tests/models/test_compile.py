"""``--compile``: blocks compile without a graph break and change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_nepa.config import ActivationCheckpointing, ParallelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.nepa import NepaForPretraining
from tests.distributed.cases import MODEL, sample_images, spread_vectors


def loss_and_gradients(compiled: bool, checkpointing: ActivationCheckpointing) -> tuple[float, dict[str, Tensor]]:
    parallel = ParallelConfig(activation_checkpointing=checkpointing)
    model = NepaForPretraining(replace(MODEL, num_layers=2), build=Build(parallel))
    spread_vectors(model)
    if compiled:
        for block in model.trunk.blocks:
            block.compile(fullgraph=True)
    for first in (0, 4):  # a second micro-batch would show a recompilation
        output = model(sample_images(range(first, first + 4), MODEL, torch.float32), torch.arange(first, first + 4))
        output.loss.backward()
    return output.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_equal_eager_ones(checkpointing: ActivationCheckpointing) -> None:
    torch._dynamo.reset()
    eager_loss, eager = loss_and_gradients(False, checkpointing)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_loss, compiled = loss_and_gradients(True, checkpointing)
    assert abs(eager_loss - compiled_loss) <= 1e-6
    assert compiled.keys() == eager.keys()
    for name, gradient in eager.items():
        assert (compiled[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
