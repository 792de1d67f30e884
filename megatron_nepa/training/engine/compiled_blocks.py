"""``--compile``: what of a model is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from megatron_nepa.models.transformer import Block
from megatron_nepa.training.engine.average_copy import ComputesWithAverage


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every transformer block that a step computes, each whole, when it is first called.

    Those are the trunk's, those of MAE's decoder or JEPA's predictor, and those of JEPA's targets. Blocks of one shape
    share what they are compiled to.

    Args:
        model: that is trained.
        backend: as ``torch.compile`` takes it.
    """
    parts = [model]
    if isinstance(model, ComputesWithAverage):
        parts.append(model.targets.trunk)
    for part in parts:
        for module in part.modules():
            if isinstance(module, Block):
                module.compile(backend=backend)
