"""Blocks one after another: of the trunk, and of what an objective adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from megatron_nepa.models.recomputation import recomputed
from megatron_nepa.models.transformer import Block, Norm
from megatron_nepa.parallel.parameters import sum_split_gradients


def run_blocks(
    blocks: nn.ModuleList,
    norm: Norm,
    stream: Tensor,
    *,
    angles: Tensor | None,
    num_samples: int,
    period: int,
    rope_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    visible: Tensor | None = None,
    recompute: bool = False,
    taps: Sequence[int] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Transform a residual stream.

    Args:
        blocks: each a :class:`Block`, one at least.
        norm: the norm after the last of them.
        stream: this rank's rows [n, D].
        angles, num_samples, period, rope_scale, visible: as :meth:`Block.forward` takes them.
        row_scale: DropPath factors of the two branches of every block in turn, fp32 [2 * blocks, n]; None drops
            nothing.
        recompute: keep the blocks' inputs alone for the backward pass.
        taps: blocks, counted from 0, whose streams are returned as well.

    Returns:
        The norm's output [n, D], and the streams after the tapped blocks, without a norm.
    """
    stack = cast("list[Block]", list(blocks))
    first = stack[0]
    norms = [block.norm1 for block in stack] + [norm]
    factors: Sequence[Tensor | None] = [None] * (2 * len(stack)) if row_scale is None else row_scale.unbind()
    split = ("rows",) if first.sequence_parallel else ()
    weight, bias = sum_split_gradients((norms[0].weight, norms[0].bias), split, first.tensor)
    assert weight is not None
    assert bias is not None
    normed = first.kernels.layer_norm(stream, weight, bias, first.eps)  # [n, D]
    tapped = []
    for i, block in enumerate(stack):
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
            factors[2 * i],
            factors[2 * i + 1],
            num_samples,
            period,
            visible,
        )
        if i in taps:
            tapped.append(stream)
    return normed, tuple(tapped)
