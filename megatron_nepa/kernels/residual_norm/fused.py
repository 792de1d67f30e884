# mypy: disable-error-code="no-untyped-def"
"""The seam between two branches as one Triton kernel a direction, and its torch custom op."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_nepa.kernels.launching.launch import FLOATS, check_tensor, launch

MAX_WIDTH = 16384  # one program holds a whole row
MAX_PROGRAMS = 512  # programs of the backward pass, each with a partial sum of the parameters' gradients
MIN_ROWS = 32  # rows that a program sums at least, so that partial sums stay within 3 % of the traffic


@triton.jit
def _forward_kernel(
    stream, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, total_out, normed_out,
    D: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, DROPPED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < D
    at = row * D + col
    total = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(branch_bias + col, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        total *= tl.load(layer_scale + col, mask=mask, other=0.0).to(tl.float32)
    if DROPPED:
        total *= tl.load(row_scale + row)
    total += tl.load(stream + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_out + at, total, mask=mask)
    centred = tl.where(mask, total - tl.sum(total, axis=0) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + EPS)
    weight = tl.load(norm_weight + col, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_out + at, centred * rstd * weight + bias, mask=mask)


@triton.jit
def _backward_kernel(
    dtotal, dnormed, total, branch, branch_bias, layer_scale, row_scale, norm_weight, dstream, dbranch, partials,
    rows, steps,
    D: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, DROPPED: tl.constexpr,
    STREAM_USED: tl.constexpr, NORMED_USED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * steps
    col = tl.arange(0, BLOCK)
    mask = col < D
    weight = tl.load(norm_weight + col, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        gamma = tl.load(layer_scale + col, mask=mask, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)  # of dnormed * standardised row
    bias_sum = tl.zeros([BLOCK], tl.float32)  # of dnormed
    update_sum = tl.zeros([BLOCK], tl.float32)  # of the gradient of gamma * (branch + bias)
    gamma_sum = tl.zeros([BLOCK], tl.float32)  # of that times branch
    for row in range(start, min(start + steps, rows)):
        at = row * D + col
        # all loads before the first reduction: a wide row leaves one program on an SM, with no other to hide them
        if NORMED_USED:
            total_row = tl.load(total + at, mask=mask, other=0.0)
            dnormed_row = tl.load(dnormed + at, mask=mask, other=0.0)
        if STREAM_USED:
            dtotal_row = tl.load(dtotal + at, mask=mask, other=0.0)
        if SCALED:
            branch_row = tl.load(branch + at, mask=mask, other=0.0)
        dx = tl.zeros([BLOCK], tl.float32)
        if NORMED_USED:
            x = total_row.to(tl.float32)
            x = tl.where(mask, x - tl.sum(x, axis=0) / D, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + EPS)
            x *= rstd
            dy = dnormed_row.to(tl.float32)
            weight_sum += dy * x
            bias_sum += dy
            dy *= weight
            dx = rstd * (dy - tl.sum(dy, axis=0) / D - x * (tl.sum(dy * x, axis=0) / D))
        if STREAM_USED:
            dx += dtotal_row.to(tl.float32)
        tl.store(dstream + at, dx, mask=mask)
        if DROPPED:
            dx *= tl.load(row_scale + row)
        update_sum += dx
        if SCALED:
            gamma_sum += dx * branch_row.to(tl.float32)
            dx *= gamma
        tl.store(dbranch + at, dx, mask=mask)
    partial = partials + tl.program_id(0).to(tl.int64) * (4 * D) + col
    tl.store(partial, weight_sum, mask=mask)
    tl.store(partial + D, bias_sum, mask=mask)
    if SCALED:
        bias = tl.load(branch_bias + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial + 2 * D, update_sum * gamma, mask=mask)
        tl.store(partial + 3 * D, gamma_sum + update_sum * bias, mask=mask)
    else:
        tl.store(partial + 2 * D, update_sum, mask=mask)
        tl.store(partial + 3 * D, gamma_sum, mask=mask)


def _check(
    stream: Tensor, branch: Tensor, branch_bias: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor,
) -> None:  # fmt: skip
    check_tensor("stream", stream, (None, None), FLOATS)
    rows, width = stream.shape
    if width > MAX_WIDTH:
        raise ValueError(f"stream has {width} columns; the kernel holds a whole row and takes up to {MAX_WIDTH}.")
    check_tensor("branch", branch, (rows, width), FLOATS, stream)
    check_tensor("branch_bias", branch_bias, (width,), FLOATS, stream)
    if layer_scale is not None:
        check_tensor("layer_scale", layer_scale, (width,), FLOATS, stream)
    if row_scale is not None:
        check_tensor("row_scale", row_scale, (rows,), (torch.float32,), stream)
    check_tensor("norm_weight", norm_weight, (width,), FLOATS, stream)
    check_tensor("norm_bias", norm_bias, (width,), FLOATS, stream)


def _tile(width: int) -> tuple[int, int]:
    """Columns that a program spans, a power of two, and its warps: 8 values a thread."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


def forward(
    stream: Tensor, branch: Tensor, branch_bias: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; returns the new stream and its LayerNorm."""
    _check(stream, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias)
    total, normed = torch.empty_like(stream), torch.empty_like(stream, dtype=norm_weight.dtype)
    if stream.numel():
        block, warps = _tile(stream.shape[1])
        launch(
            _forward_kernel, (stream.shape[0],),
            stream, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, total, normed,
            D=stream.shape[1], BLOCK=block, SCALED=layer_scale is not None, DROPPED=row_scale is not None, EPS=eps,
            num_warps=warps,
        )  # fmt: skip
    return total, normed


def backward(
    dtotal: Tensor | None, dnormed: Tensor | None, total: Tensor, branch: Tensor | None, branch_bias: Tensor,
    layer_scale: Tensor | None, row_scale: Tensor | None, norm_weight: Tensor, eps: float, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernel.

    Returns:
        Gradients of the stream and of the branch, [n, D] each, and of norm weight, norm bias, branch bias and
        LayerScale, fp32 [4, D].
    """
    rows, width = total.shape
    for name, tensor in (("dtotal", dtotal), ("dnormed", dnormed), ("branch", branch)):
        if tensor is not None:
            check_tensor(name, tensor, (rows, width), FLOATS, total)
    dstream, dbranch = torch.empty_like(total), torch.empty_like(total, dtype=branch_dtype)
    steps = max(MIN_ROWS, triton.cdiv(rows, MAX_PROGRAMS))
    programs = triton.cdiv(rows, steps)
    partials = total.new_empty(programs, 4, width, dtype=torch.float32)
    if total.numel():
        block, warps = _tile(width)
        launch(
            _backward_kernel, (programs,),
            dtotal, dnormed, total, branch, branch_bias, layer_scale, row_scale, norm_weight, dstream, dbranch,
            partials, rows, steps, D=width, BLOCK=block, SCALED=layer_scale is not None,
            DROPPED=row_scale is not None, STREAM_USED=dtotal is not None, NORMED_USED=dnormed is not None,
            EPS=eps, num_warps=warps,
        )  # fmt: skip
    return dstream, dbranch, partials.sum(0)  # the second stage; no atomics, so the same sum every time


_forward_op = torch.library.custom_op("megatron_nepa::residual_norm", forward, mutates_args=())
_backward_op = torch.library.custom_op("megatron_nepa::residual_norm_backward", backward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(
    stream: Tensor, branch: Tensor, branch_bias: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(stream), torch.empty_like(stream, dtype=norm_weight.dtype)


@_backward_op.register_fake
def _backward_fake(
    dtotal: Tensor | None, dnormed: Tensor | None, total: Tensor, branch: Tensor | None, branch_bias: Tensor,
    layer_scale: Tensor | None, row_scale: Tensor | None, norm_weight: Tensor, eps: float, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    partial = total.new_empty(4, total.shape[1], dtype=torch.float32)
    return torch.empty_like(total), torch.empty_like(total, dtype=branch_dtype), partial


def _setup_context(ctx, inputs, output) -> None:
    _, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)  # the last seam's stream goes nowhere: read no zeros for it
    kept = branch if layer_scale is not None else None  # only LayerScale's gradient needs the branch
    ctx.save_for_backward(output[0], kept, branch_bias, layer_scale, row_scale, norm_weight)
    ctx.branch_dtype, ctx.norm_bias_dtype = branch.dtype, norm_bias.dtype


def _backward(ctx, dtotal, dnormed):
    if dtotal is None and dnormed is None:
        return (None,) * 8
    total, branch, branch_bias, layer_scale, row_scale, norm_weight = ctx.saved_tensors
    dtotal, dnormed = (None if grad is None else grad.contiguous() for grad in (dtotal, dnormed))
    dstream, dbranch, (dweight, dbias, dbranch_bias, dscale) = _backward_op(
        dtotal, dnormed, total, branch, branch_bias, layer_scale, row_scale, norm_weight, ctx.eps, ctx.branch_dtype
    )
    return (
        dstream,
        dbranch,
        dbranch_bias.to(branch_bias.dtype),
        None if layer_scale is None else dscale.to(layer_scale.dtype),
        None,
        dweight.to(norm_weight.dtype),
        dbias.to(ctx.norm_bias_dtype),
        None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def residual_norm_triton(
    stream: Tensor,
    branch: Tensor,
    branch_bias: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``residual_norm_reference`` in one pass each way.

    With U the bytes of one bf16 [n, D] tensor and an fp32 stream (2U), forward moves 6U: stream and branch in, stream
    and normed out. Backward moves 9U: the gradients of both outputs, the new stream and the branch in, the gradients of
    stream and branch out. Parameter gradients are summed in two stages without atomics, so they repeat bit for bit.

    LayerScale is applied here rather than folded into the branch's last weight (gamma * W, gamma * b). Folding spares
    backward the branch, 1U a seam, and costs about 6 passes over those weights a layer and micro-batch, so it
    breaks even at 3 (D + F) tokens a device: 8,400 for NEPA-B, 36,900 for NEPA-7B. By this count it would save 3 % of
    the fused operations' bytes for NEPA-B at 256 images a device and add 12 % for NEPA-7B at 32. Hence unfolded, whose
    loss is bounded: never more than 1U in 9.

    Args:
        stream: [n, D], fp32 or bf16, D at most 16384. This and every other tensor contiguous.
        branch: [n, D], fp32 or bf16, without its bias.
        branch_bias: [D].
        layer_scale: [D] or None.
        row_scale: DropPath factor of each row, fp32 [n], or None.
        norm_weight, norm_bias: [D].
        eps: added to the variance in fp32.

    Returns:
        The new stream [n, D] in ``stream``'s dtype and its LayerNorm [n, D] in ``norm_weight``'s dtype.

    Raises:
        ValueError: an argument of another shape, dtype or layout.
    """
    return _forward_op(stream, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, eps)
