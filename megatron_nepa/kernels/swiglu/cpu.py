"""SwiGLU on a CPU: a few rows at a time, which stay in the cache from one pass to the next, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.kernels.cached_parts import cached_parts
from megatron_nepa.kernels.swiglu.reference import swiglu_reference

CACHED_BYTES = 2**19  # of gate_up in fp32 that are worked on at once


def swiglu_cpu(gate_up: Tensor) -> Tensor:
    """Like :func:`~megatron_nepa.kernels.swiglu.reference.swiglu_reference`; only ``gate_up`` is kept for backward.

    ``--compile`` gets the reference, whose passes a compiler joins.
    """
    if torch.compiler.is_compiling():
        return swiglu_reference(gate_up)
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for part in _parts(gate_up):
            gate, up = gate_up[part].to(_wide(gate_up)).chunk(2, dim=-1)
            out[part].copy_(torch.nn.functional.silu(gate).mul_(up))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        result = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        for part in _parts(gate_up):
            gate, up = gate_up[part].to(_wide(gate_up)).chunk(2, dim=-1)
            upstream = grad[part].to(gate.dtype)
            gate_grad, up_grad = result[part].chunk(2, dim=-1)
            gate_grad.copy_(torch.ops.aten.silu_backward(upstream * up, gate))
            up_grad.copy_(torch.nn.functional.silu(gate).mul_(upstream))
        return result


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parts(gate_up: Tensor) -> Iterator[slice]:
    return cached_parts(gate_up.shape[0], gate_up.shape[1] * _wide(gate_up).itemsize, CACHED_BYTES)
