"""The kernel launches of a model, one case an operation and direction, with the bytes that each must move at least."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.operations import OPERATIONS
from megatron_nepa.kernels.record import Case


def model_cases(model: ModelConfig, batch: int, tokens: int, device: str) -> Iterator[Case]:
    """Every launch of one block and of the loss, for ``batch`` samples of ``tokens`` tokens in bf16 on ``device``.

    The optional parts are on (affine QK-norm beside the plain one, RoPE rescale, LayerScale, DropPath), since they
    can only cost registers. ``device`` may be ``meta``: then the launches must be intercepted.
    """

    def new(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype or torch.bfloat16, device=device)

    for operation in OPERATIONS:
        if operation.serves(model):
            yield from operation.launches(model, batch, tokens, new)
