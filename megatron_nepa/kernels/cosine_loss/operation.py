"""The loss as the project's lists know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.cosine_loss.reference import cosine_loss_reference
from megatron_nepa.kernels.record import Case, NewTensor, Operation


def _fused() -> Callable[..., Any]:
    from megatron_nepa.kernels.cosine_loss.fused import cosine_loss_triton

    return cosine_loss_triton


def _inputs(model: ModelConfig, batch: int, new: NewTensor) -> dict[str, Any]:
    tokens, width = model.sequence_length, model.hidden_size
    rows = batch * tokens
    pair = {"prediction": new(rows, width), "target": new(rows, width)}
    return pair | {"shift": 1, "skip": 0, "period": tokens, "first_row": 0, "num_rows": rows}


def _minimum_bytes(model: ModelConfig, rows: int, itemsize: int) -> tuple[int, int]:
    unit = rows * model.hidden_size * itemsize
    return 2 * unit, 3 * unit


def _launches(model: ModelConfig, batch: int, tokens: int, new: NewTensor) -> Iterator[Case]:
    from megatron_nepa.kernels.cosine_loss import fused

    rows = batch * tokens
    prediction, target = new(rows, model.hidden_size), new(rows, model.hidden_size)
    layout = (1, 0, tokens, 0, rows)
    sums = new(3, dtype=torch.float32)
    forward, backward = _minimum_bytes(model, rows, 2)
    yield Case("cosine_loss", "forward", partial(fused.forward, prediction, target, *layout), forward)
    yield Case("cosine_loss", "backward", partial(fused.backward, sums, prediction, target, *layout), backward)


COSINE_LOSS = Operation(
    "cosine_loss",
    cosine_loss_reference,
    _fused,
    _inputs,
    trained=("prediction",),
    minimum_bytes=_minimum_bytes,
    launches=_launches,
    scale=1.0,  # a mean of cosines, which of random vectors cancel
)
