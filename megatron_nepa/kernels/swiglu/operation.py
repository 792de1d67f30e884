"""SwiGLU as the project's lists know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.record import Case, NewTensor, Operation
from megatron_nepa.kernels.swiglu.cpu import swiglu_cpu
from megatron_nepa.kernels.swiglu.reference import swiglu_reference


def _fused() -> Callable[[Tensor], Tensor]:
    from megatron_nepa.kernels.swiglu.fused import swiglu_triton

    return swiglu_triton


def _inputs(model: ModelConfig, batch: int, new: NewTensor) -> dict[str, Any]:
    return {"gate_up": new(batch * model.sequence_length, 2 * model.mlp_hidden_size)}


def _minimum_bytes(model: ModelConfig, rows: int, itemsize: int) -> tuple[int, int]:
    unit = rows * model.mlp_hidden_size * itemsize
    return 3 * unit, 5 * unit


def _launches(model: ModelConfig, batch: int, tokens: int, new: NewTensor) -> Iterator[Case]:
    from megatron_nepa.kernels.swiglu import fused

    rows = batch * tokens
    gate_up, hidden = new(rows, 2 * model.mlp_hidden_size), new(rows, model.mlp_hidden_size)
    forward, backward = _minimum_bytes(model, rows, 2)
    yield Case("swiglu", "forward", partial(fused.forward, gate_up), forward)
    yield Case("swiglu", "backward", partial(fused.backward_, hidden, gate_up), backward)


SWIGLU = Operation(
    "swiglu",
    swiglu_reference,
    _fused,
    _inputs,
    trained=("gate_up",),
    minimum_bytes=_minimum_bytes,
    launches=_launches,
    serves=lambda model: model.mlp == "swiglu",
    on_cpu=swiglu_cpu,
)
