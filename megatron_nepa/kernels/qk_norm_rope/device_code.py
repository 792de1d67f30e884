# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of QK-norm and 2-D RoPE in place on packed qkv.

A program holds the q and k heads of one token, which lie next to each other in memory, as two tiles: the first and the
second half of every head's channels, so that rotation is elementwise between the tiles.
"""

import triton
import triton.language as tl


@triton.jit
def _cos_sin_of(x):
    """Cosine and sine of |x| up to 10,000, good to 2 units in the last place (Cephes' polynomials).

    The library's functions take a slow path for huge arguments, which angles never are, and 50 registers for it.
    """
    quarters = tl.floor(x * 0.63661977236 + 0.5)  # of a turn
    rest = ((x - quarters * 1.5703125) - quarters * 4.837512969970703e-4) - quarters * 7.54978995489188e-8
    square = rest * rest
    sin = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cos = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cos = cos - 0.5 * square + 1.0
    turns = quarters.to(tl.int32)
    odd = (turns & 1) == 1
    sine = tl.where(odd, cos, sin)
    cosine = tl.where(odd, sin, cos)
    return tl.where(((turns + 1) & 2) == 2, -cosine, cosine), tl.where((turns & 2) == 2, -sine, sine)


@triton.jit
def _cos_sin(angles, scale, token, tokens_per_sample, angle_rows, col, HALF: tl.constexpr, RESCALE: tl.constexpr):
    """Cosine and sine, [1, COLS], of one token's angles: of ``angle_rows``, a sample's tokens or those of all."""
    turn = tl.load(angles + (token % angle_rows) * HALF + col, mask=col < HALF, other=0.0)
    if RESCALE:
        turn *= tl.load(scale + token // tokens_per_sample)
    return _cos_sin_of(turn)


@triton.jit
def _standardise(first, second, mask, HALF: tl.constexpr, EPS: tl.constexpr):
    """Two-pass LayerNorm of each row of the two tiles; returns them and the reciprocal std, [ROWS, 1]."""
    mean = tl.sum(first + second, axis=1, keep_dims=True) / (2 * HALF)
    first = tl.where(mask, first - mean, 0.0)
    second = tl.where(mask, second - mean, 0.0)
    variance = tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF)
    rstd = 1.0 / tl.sqrt(variance + EPS)
    return first * rstd, second * rstd, rstd


@triton.jit
def _head_weight(q_weight, k_weight, row, col, HEADS: tl.constexpr, HALF: tl.constexpr):
    """The affine weight of each row's head, [ROWS, COLS]: q's for the first HEADS rows, k's for the others."""
    q = tl.load(q_weight + col, mask=col < HALF, other=0.0).to(tl.float32)
    k = tl.load(k_weight + col, mask=col < HALF, other=0.0).to(tl.float32)
    return tl.where(row < HEADS, q, k)


@triton.jit
def qk_norm_rope_forward(
    qkv, angles, scale, q_weight, k_weight, saved, tokens_per_sample, angle_rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROTATE: tl.constexpr, RESCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    mask = (row < 2 * HEADS) & (col < HALF)
    at = qkv + token * (6 * HEADS * HALF) + row * (2 * HALF) + col
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        if AFFINE:  # a weight may be 0, so that the output does not determine the input: keep the input
            kept = saved + token * (4 * HEADS * HALF) + row * (2 * HALF) + col
            tl.store(kept, first, mask=mask)
            tl.store(kept + HALF, second, mask=mask)
        first, second, rstd = _standardise(first, second, mask, HALF, EPS)
        if AFFINE:
            first *= _head_weight(q_weight, k_weight, row, col, HEADS, HALF)
            second *= _head_weight(q_weight + HALF, k_weight + HALF, row, col, HEADS, HALF)
        else:
            tl.store(saved + token * (2 * HEADS) + row, rstd, mask=row < 2 * HEADS)
    if ROTATE:
        cos, sin = _cos_sin(angles, scale, token, tokens_per_sample, angle_rows, col, HALF, RESCALE)
        first, second = first * cos - second * sin, second * cos + first * sin
    tl.store(at, first, mask=mask)
    tl.store(at + HALF, second, mask=mask)


@triton.jit
def qk_norm_rope_backward(
    grad, out, angles, scale, q_weight, k_weight, saved, partials, tokens, tokens_per_sample, angle_rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROTATE: tl.constexpr, RESCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * STEPS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    mask = (row < 2 * HEADS) & (col < HALF)
    if AFFINE:
        first_sum = tl.zeros([ROWS, COLS], tl.float32)
        second_sum = tl.zeros([ROWS, COLS], tl.float32)
    for token in range(start, min(start + STEPS, tokens)):
        shift = token * (6 * HEADS * HALF) + row * (2 * HALF) + col
        first = tl.load(grad + shift, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(grad + shift + HALF, mask=mask, other=0.0).to(tl.float32)
        if ROTATE:
            cos, sin = _cos_sin(angles, scale, token, tokens_per_sample, angle_rows, col, HALF, RESCALE)
            first, second = first * cos + second * sin, second * cos - first * sin
        if NORM:
            if AFFINE:
                kept = saved + token * (4 * HEADS * HALF) + row * (2 * HALF) + col
                x_first = tl.load(kept, mask=mask, other=0.0).to(tl.float32)
                x_second = tl.load(kept + HALF, mask=mask, other=0.0).to(tl.float32)
                x_first, x_second, rstd = _standardise(x_first, x_second, mask, HALF, EPS)
                first_sum += first * x_first
                second_sum += second * x_second
                first *= _head_weight(q_weight, k_weight, row, col, HEADS, HALF)
                second *= _head_weight(q_weight + HALF, k_weight + HALF, row, col, HEADS, HALF)
            else:  # the output is the standardised input, rotated
                x_first = tl.load(out + shift, mask=mask, other=0.0).to(tl.float32)
                x_second = tl.load(out + shift + HALF, mask=mask, other=0.0).to(tl.float32)
                if ROTATE:
                    x_first, x_second = x_first * cos + x_second * sin, x_second * cos - x_first * sin
                rstd = tl.load(saved + token * (2 * HEADS) + row, mask=row < 2 * HEADS, other=0.0)
            mean = tl.sum(first + second, axis=1, keep_dims=True) / (2 * HALF)
            slope = tl.sum(first * x_first + second * x_second, axis=1, keep_dims=True) / (2 * HALF)
            first = rstd * (first - mean - x_first * slope)
            second = rstd * (second - mean - x_second * slope)
        tl.store(grad + shift, first, mask=mask)
        tl.store(grad + shift + HALF, second, mask=mask)
    if AFFINE:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        partial = partials + program * (4 * HALF) + tl.arange(0, COLS)
        keep = tl.arange(0, COLS) < HALF
        is_q = row < HEADS
        tl.store(partial, tl.sum(tl.where(is_q, first_sum, 0.0), axis=0), mask=keep)
        tl.store(partial + HALF, tl.sum(tl.where(is_q, second_sum, 0.0), axis=0), mask=keep)
        tl.store(partial + 2 * HALF, tl.sum(tl.where(is_q, 0.0, first_sum), axis=0), mask=keep)
        tl.store(partial + 3 * HALF, tl.sum(tl.where(is_q, 0.0, second_sum), axis=0), mask=keep)
