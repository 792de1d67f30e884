# mypy: disable-error-code="no-untyped-def"
"""SwiGLU as one Triton kernel a direction, and its torch custom op."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_nepa.kernels.launching.launch import FLOATS, check_tensor, launch

BLOCK = 1024  # 8 bf16 values (one 16-byte access) a thread with 4 warps
NUM_WARPS = 4


@triton.jit
def _forward_kernel(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < F
    gate = tl.load(gate_up + row * (2 * F) + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * F + col, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _backward_kernel(grad, gate_up, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < F
    gate_at = gate_up + row * (2 * F) + col
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + F, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(grad + row * F + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(gate_at, dout * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)
    tl.store(gate_at + F, dout * silu, mask=mask)


def forward(gate_up: Tensor) -> Tensor:
    """Launch the forward kernel: [N, 2F] to a new [N, F]."""
    check_tensor("gate_up", gate_up, (None, None), FLOATS)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; it packs gate and up, so their number must be even.")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        launch(
            _forward_kernel, (rows, triton.cdiv(width, BLOCK)), gate_up, out, F=width, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def backward_(grad: Tensor, gate_up: Tensor) -> None:
    """Launch the backward kernel: ``gate_up`` becomes its own gradient."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    check_tensor("grad", grad, (rows, width), FLOATS, gate_up)
    if grad.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        launch(_backward_kernel, grid, grad, gate_up, F=width, BLOCK=BLOCK, num_warps=NUM_WARPS)


_forward_op = torch.library.custom_op("megatron_nepa::swiglu", forward, mutates_args=())
_backward_op = torch.library.custom_op("megatron_nepa::swiglu_backward_", backward_, mutates_args=("gate_up",))


@_forward_op.register_fake
def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_backward_op.register_fake
def _backward_fake(grad: Tensor, gate_up: Tensor) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    (gate_up,) = inputs
    # backward overwrites what is saved here: a leaf is the caller's own tensor, so it is not ours to overwrite
    ctx.save_for_backward(gate_up.detach().clone() if gate_up.is_leaf else gate_up)


def _backward(ctx, grad):
    (gate_up,) = ctx.saved_tensors  # autograd raises here the second time: the buffer's version has moved on
    _backward_op(grad.contiguous(), gate_up)
    return gate_up


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """``swiglu_reference`` in one pass each way.

    With V the bytes of one [N, F] tensor, forward moves 3V and backward 5V, the least possible. Backward writes the
    gradient over ``gate_up`` itself, so it needs no further memory, and a second backward through the
    same graph raises ``RuntimeError``.

    Args:
        gate_up: [N, 2F], contiguous, fp32 or bf16, gate in the first F columns.

    Returns:
        [N, F] in the input's dtype; computed in fp32 and rounded once.

    Raises:
        ValueError: another shape, dtype or layout.
    """
    return _forward_op(gate_up)
