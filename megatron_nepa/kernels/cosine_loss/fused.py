# mypy: disable-error-code="no-untyped-def"
"""The NEPA loss as one Triton kernel a direction, and its torch custom op."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_nepa.kernels.cosine_loss.reference import NORM_EPS, cosine_loss_reference
from megatron_nepa.kernels.launching.launch import FLOATS, check_tensor, launch

MAX_WIDTH = 16384  # one program holds a whole row of prediction and target
ROWS_PER_PARTIAL = 16  # rows whose cosines one program sums before the second stage


@triton.jit
def _pair(prediction, target, row, col, shift, skip, period, first_row, num_rows, D: tl.constexpr):
    """One row of prediction and its target (zeros without a pair), their norms, and whether they are a pair."""
    position = (first_row + row) % period
    paired = (position < period - shift) & (position >= skip) & (first_row + row < num_rows)
    mask = col < D * paired.to(tl.int32)
    y = tl.load(prediction + row * D + col, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(target + (row + shift) * D + col, mask=mask, other=0.0).to(tl.float32)
    y_norm = tl.sqrt(tl.sum(y * y, axis=0))
    z_norm = tl.sqrt(tl.sum(z * z, axis=0))
    return y, z, y_norm, z_norm, paired


@triton.jit
def _forward_kernel(
    prediction, target, partials, rows, shift, skip, period, first_row, num_rows, inverse_pairs,
    D: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * STEPS
    col = tl.arange(0, BLOCK)
    cosines = 0.0
    y_norms = 0.0
    z_norms = 0.0
    for row in range(start, min(start + STEPS, rows)):
        y, z, y_norm, z_norm, _paired = _pair(prediction, target, row, col, shift, skip, period, first_row, num_rows, D)
        cosines += tl.sum(y * z, axis=0) / (tl.maximum(y_norm, NORM_EPS) * tl.maximum(z_norm, NORM_EPS))
        y_norms += y_norm
        z_norms += z_norm
    partial = partials + tl.program_id(0).to(tl.int64) * 3
    tl.store(partial, cosines * inverse_pairs)
    tl.store(partial + 1, y_norms * inverse_pairs)
    tl.store(partial + 2, z_norms * inverse_pairs)


@triton.jit
def _backward_kernel(
    dsums, prediction, target, dprediction, shift, skip, period, first_row, num_rows, inverse_pairs,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    y, z, y_norm, z_norm, paired = _pair(prediction, target, row, col, shift, skip, period, first_row, num_rows, D)
    inverse_y = 1.0 / tl.maximum(y_norm, NORM_EPS)
    y *= inverse_y
    z *= 1.0 / tl.maximum(z_norm, NORM_EPS)
    # below the clamp the norm is a constant and has no gradient
    cosine = tl.where(y_norm >= NORM_EPS, tl.sum(y * z, axis=0), 0.0)
    factor = tl.load(dsums) * inverse_pairs * inverse_y
    dy = tl.where(paired, factor * (z - cosine * y), 0.0)
    tl.store(dprediction + row * D + col, dy, mask=col < D)


def _check(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> int:
    """Refuse what the kernels would misread; returns the replica's number of pairs."""
    check_tensor("prediction", prediction, (None, None), FLOATS)
    rows, width = prediction.shape
    check_tensor("target", target, (None, width), FLOATS, prediction)
    if width > MAX_WIDTH:
        raise ValueError(f"prediction has {width} columns; the kernel holds a whole row and takes up to {MAX_WIDTH}.")
    if min(shift, skip, first_row) < 0 or period < 1 or num_rows % period or shift + skip >= period:
        raise ValueError(
            f"shift {shift}, skip {skip}, period {period}, first_row {first_row}, num_rows {num_rows} leave no pairs; "
            "none may be negative, num_rows must be a multiple of period and shift + skip less than period."
        )
    for row in range(max(0, target.shape[0] - shift), rows):  # these partners lie past the end of the target
        position = (first_row + row) % period
        if skip <= position < period - shift and first_row + row < num_rows:
            raise ValueError(
                f"target has {target.shape[0]} rows, but row {row} of prediction is paired with row {row + shift}: "
                "append the next rank's first row (the halo)."
            )
    return num_rows // period * (period - shift - skip)


def _tile(width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


def forward(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> Tensor:
    """Launch the forward kernel; returns fp32 [3]: this rank's shares of mean cosine and of both mean norms."""
    pairs = _check(prediction, target, shift, skip, period, first_row, num_rows)
    rows, width = prediction.shape
    programs = triton.cdiv(rows, ROWS_PER_PARTIAL)
    partials = prediction.new_empty(programs, 3, dtype=torch.float32)
    if prediction.numel():
        block, warps = _tile(width)
        launch(
            _forward_kernel, (programs,),
            prediction, target, partials, rows, shift, skip, period, first_row, num_rows, 1.0 / max(pairs, 1),
            D=width, BLOCK=block, STEPS=ROWS_PER_PARTIAL, NORM_EPS=NORM_EPS, num_warps=warps,
        )  # fmt: skip
    return partials.sum(0)  # the second stage; no atomics, so the same sum every time


def backward(
    dsums: Tensor, prediction: Tensor, target: Tensor,
    shift: int, skip: int, period: int, first_row: int, num_rows: int,
) -> Tensor:  # fmt: skip
    """Launch the backward kernel: the prediction's gradient from ``dsums``, fp32 [3], of which the first counts."""
    pairs = _check(prediction, target, shift, skip, period, first_row, num_rows)
    check_tensor("dsums", dsums, (3,), (torch.float32,), prediction)
    dprediction = torch.empty_like(prediction)
    if prediction.numel():
        block, warps = _tile(prediction.shape[1])
        launch(
            _backward_kernel, (prediction.shape[0],),
            dsums, prediction, target, dprediction, shift, skip, period, first_row, num_rows, 1.0 / max(pairs, 1),
            D=prediction.shape[1], BLOCK=block, NORM_EPS=NORM_EPS, num_warps=warps,
        )  # fmt: skip
    return dprediction


_forward_op = torch.library.custom_op("megatron_nepa::cosine_loss", forward, mutates_args=())
_backward_op = torch.library.custom_op("megatron_nepa::cosine_loss_backward", backward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> Tensor:
    return prediction.new_empty(3, dtype=torch.float32)


@_backward_op.register_fake
def _backward_fake(
    dsums: Tensor, prediction: Tensor, target: Tensor,
    shift: int, skip: int, period: int, first_row: int, num_rows: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(prediction)


def _setup_context(ctx, inputs, output) -> None:
    prediction, target, *ctx.layout = inputs
    ctx.save_for_backward(prediction, target)


def _backward(ctx, dsums):
    return _backward_op(dsums.contiguous(), *ctx.saved_tensors, *ctx.layout), None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def cosine_loss_triton(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """``cosine_loss_reference`` in one pass each way.

    With U the bytes of one [n, D] tensor, forward reads 2U and backward moves 3U. Writing an unscaled gradient in the
    forward pass and scaling it in the backward one moves the same 5U, but rounds twice and does the gradient's work
    also when none is asked for. The sums have two stages and no atomics, so they repeat bit for bit.

    Args:
        prediction: [n, D], contiguous, fp32 or bf16, D at most 16384.
        target: [m, D], likewise. One that requires grad (the ablation without stop-gradient) goes to the reference.
        shift, skip, period, first_row, num_rows: as in ``cosine_loss_reference``.

    Returns:
        The loss share and three health figures, as ``cosine_loss_reference``.

    Raises:
        ValueError: another shape, dtype or layout, rows that leave no pairs, or a target without its halo row.
    """
    if target.requires_grad:
        return cosine_loss_reference(prediction, target, shift, skip, period, first_row, num_rows)
    sums = _forward_op(prediction, target, shift, skip, period, first_row, num_rows)
    return -sums[0], sums.detach()
