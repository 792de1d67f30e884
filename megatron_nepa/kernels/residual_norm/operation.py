"""The seam between two branches as the project's lists know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.record import Case, NewTensor, Operation
from megatron_nepa.kernels.residual_norm.cpu import residual_norm_cpu
from megatron_nepa.kernels.residual_norm.reference import residual_norm_reference


def _fused() -> Callable[..., Any]:
    from megatron_nepa.kernels.residual_norm.fused import residual_norm_triton

    return residual_norm_triton


def _inputs(model: ModelConfig, batch: int, new: NewTensor) -> dict[str, Any]:
    rows, width = batch * model.sequence_length, model.hidden_size
    return {
        "stream": new(rows, width, dtype=torch.float32),
        "branch": new(rows, width),
        "branch_bias": new(width),
        "layer_scale": new(width),
        "row_scale": torch.ones_like(new(rows, dtype=torch.float32)),
        "norm_weight": new(width),
        "norm_bias": new(width),
        "eps": model.layer_norm_eps,
    }


def _minimum_bytes(model: ModelConfig, rows: int, itemsize: int) -> tuple[int, int]:
    unit, stream = rows * model.hidden_size * itemsize, rows * model.hidden_size * 4
    # forward: the stream in and out, branch, normed; backward: both streams and one gradient in and out, branch, two
    # gradients
    return 2 * stream + 2 * unit, 3 * stream + 3 * unit


def _launches(model: ModelConfig, batch: int, tokens: int, new: NewTensor) -> Iterator[Case]:
    from megatron_nepa.kernels.residual_norm import fused

    rows, width, eps = batch * tokens, model.hidden_size, model.layer_norm_eps
    stream, branch = new(rows, width, dtype=torch.float32), new(rows, width)
    vector, row_scale = new(width), new(rows, dtype=torch.float32)
    seam = (vector, vector, row_scale, vector)  # branch bias, LayerScale, DropPath, norm weight
    inputs = (stream, branch, stream.clone(), branch.clone())
    forward, backward = _minimum_bytes(model, rows, 2)
    yield Case("residual_norm", "forward", partial(fused.forward, stream, branch, *seam, vector, eps), forward)
    yield Case("residual_norm", "backward", partial(fused.backward, *inputs, *seam, eps, branch.dtype), backward)


RESIDUAL_NORM = Operation(
    "residual_norm",
    residual_norm_reference,
    _fused,
    _inputs,
    trained=("stream", "branch", "branch_bias", "layer_scale", "norm_weight", "norm_bias"),
    minimum_bytes=_minimum_bytes,
    launches=_launches,
    on_cpu=residual_norm_cpu,
)
