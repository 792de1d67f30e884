"""Blocks one after another: of the trunk, and of what an objective adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_nepa.models.recomputation import recomputed
from megatron_nepa.models.transformer import Block, Norm
from megatron_nepa.parallel.parameters import sum_split_gradients


def run_blocks(
    blocks: Sequence[Block],
    norm: Norm,
    stream: Tensor,
    *,
    angles: Tensor | None,
    rope_scale: Tensor | None,
    row_scale: Tensor | Sequence[None],
    num_samples: int,
    period: int,
    visible: Tensor | None = None,
    recompute: bool = False,
    taps: Sequence[int] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Transform a residual stream.

    Args:
        blocks: one at least.
        norm: the norm after the last of them.
        stream: this rank's rows [n, D].
        angles, rope_scale, num_samples, period, visible: as :meth:`Block.forward` takes them.
        row_scale: DropPath factors of the two branches of every block in turn, fp32 [2 * blocks, n], or as many Nones.
        recompute: keep the blocks' inputs alone for the backward pass.
        taps: blocks, counted from 0, whose streams are returned as well.

    Returns:
        The norm's output [n, D], and the streams after the tapped blocks, without a norm.
    """
    first = blocks[0]
    norms = [block.norm1 for block in blocks] + [norm]
    split = ("rows",) if first.sequence_parallel else ()
    weight, bias = sum_split_gradients((norms[0].weight, norms[0].bias), split, first.tensor)
    assert weight is not None
    assert bias is not None
    normed = first.kernels.layer_norm(stream, weight, bias, first.eps)  # [n, D]
    tapped = []
    for i, block in enumerate(blocks):
        call: Callable[..., tuple[Tensor, Tensor]] = block
        if recompute and torch.is_grad_enabled():
            call = partial(recomputed, block)
        stream, normed = call(
            stream,
            normed,
            norms[i + 1].weight,
            norms[i + 1].bias,
            angles,
            rope_scale,
            row_scale[2 * i],
            row_scale[2 * i + 1],
            num_samples,
            period,
            visible,
        )
        if i in taps:
            tapped.append(stream)
    return normed, tuple(tapped)
