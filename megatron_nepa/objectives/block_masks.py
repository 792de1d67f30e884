"""The multi-block masks of I-JEPA (Assran et al. 2023, section 3): a function of the step and of the sample's number.

All samples of a step share the blocks' sizes, a function of (seed, step); the places of a sample's blocks are one of
(seed, its number). A context block, less the target blocks, is what the encoder sees. What is left of it differs
from sample to sample, and the published collator cuts all to the least of its batch, always at the image's lower end.
Here every sample keeps the same number of context patches whatever its micro-batch: of 16 draws of the places the first
that leaves as many is taken (all its target blocks lie on each other in the last draw, which always does), and
patches beyond the number are left out at random.

Unlike the published code, a block may touch the image's lower and right edges, and the scale and the aspect of a
target block are drawn apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_nepa.config import JepaObjective
from megatron_nepa.parallel.random import derive_key, uniform, uniform_tensor

TRIES = 16  # with I-JEPA's settings one in thirty draws or fewer leaves too little, on 14 x 14 patches or more


class BlockSizes(NamedTuple):
    """Rows and columns of the blocks of one step, in patches."""

    target: tuple[int, int]
    context: tuple[int, int]


class BlockMasks(NamedTuple):
    """Patches of every sample, in raster order.

    Attributes:
        context: what the encoder sees, int64 [B, C], ascending.
        targets: what is predicted, a block each, int64 [B, M, h w].
    """

    context: Tensor
    targets: Tensor


def block_sizes(config: JepaObjective, grid: tuple[int, int], seed: int, step: int) -> BlockSizes:
    """The sizes of a step's blocks.

    Args:
        config: ranges of scale and aspect.
        grid: rows and columns of patches of an image.
        seed: the run's seed.
        step: optimizer step, counted from 0.
    """
    draws = uniform(derive_key(seed, "block_sizes"), np.array([step]), 3)[0].tolist()
    scale, aspect, context_scale = (
        low + draw * (high - low)
        for draw, low, high in zip(
            draws,
            (config.target_scale_min, config.target_aspect_min, config.context_scale_min),
            (config.target_scale_max, config.target_aspect_max, 1.0),
            strict=True,
        )
    )
    return BlockSizes(config.block_sides(scale, aspect, *grid), config.block_sides(context_scale, 1.0, *grid))


def block_masks(config: JepaObjective, grid: tuple[int, int], seed: int, step: int, sample_index: Tensor) -> BlockMasks:
    """The masks of some samples of one step, on their numbers' device.

    Args:
        config: ranges, number of target blocks M, share of context patches.
        grid: rows and columns of patches of an image.
        seed: the run's seed.
        step: optimizer step that the samples belong to, counted from 0; the host's, since shapes depend on it.
        sample_index: sample numbers, int64 [B].
    """
    height, width = grid
    sizes = block_sizes(config, grid, seed, step)
    num_context = config.num_context(height * width)
    places = uniform_tensor(derive_key(seed, "block_places"), sample_index, TRIES * (config.num_targets + 1) * 2)
    places = places.view(len(sample_index), TRIES, config.num_targets + 1, 2)  # the context block's comes last
    top = _first_line(places[..., 0], height, sizes.target[0], sizes.context[0])  # [B, tries, M + 1]
    left = _first_line(places[..., 1], width, sizes.target[1], sizes.context[1])
    top[:, -1, :-1] = top[:, -1, :1]
    left[:, -1, :-1] = left[:, -1, :1]

    in_rows = _covered(top, height, sizes.target[0], sizes.context[0])  # [B, tries, M + 1, height]
    in_columns = _covered(left, width, sizes.target[1], sizes.context[1])
    inside = in_rows[..., :, None] & in_columns[..., None, :]  # [B, tries, M + 1, height, width]
    visible = (inside[:, :, -1] & ~inside[:, :, :-1].any(dim=2)).flatten(2)  # [B, tries, patches]
    chosen = (visible.sum(dim=2) >= num_context).int().argmax(dim=1)  # the first that leaves enough
    sample = torch.arange(len(sample_index), device=sample_index.device)

    draw = uniform_tensor(derive_key(seed, "context_patches"), sample_index, height * width)
    order = torch.where(visible[sample, chosen], draw, 2.0).argsort(dim=1, stable=True)  # hidden ones at the end
    context = order[:, :num_context].sort(dim=1).values

    rows = top[sample, chosen, :-1, None] + torch.arange(sizes.target[0], device=sample_index.device)  # [B, M, h]
    columns = left[sample, chosen, :-1, None] + torch.arange(sizes.target[1], device=sample_index.device)
    targets = rows[..., :, None] * width + columns[..., None, :]
    return BlockMasks(context, targets.flatten(2))


def _first_line(draw: Tensor, lines: int, target: int, context: int) -> Tensor:
    """First row (or column) of every block from draws in [0, 1): any at which the block lies inside the image."""
    starts = torch.full(draw.shape[-1:], lines - target + 1, device=draw.device)
    starts[-1] = lines - context + 1
    return (draw * starts).long()


def _covered(first: Tensor, lines: int, target: int, context: int) -> Tensor:
    """Which of the image's rows (or columns) every block covers, bool [..., lines]."""
    extent = torch.full(first.shape[-1:], target, device=first.device)
    extent[-1] = context
    line = torch.arange(lines, device=first.device)
    return (line >= first[..., None]) & (line < (first + extent)[..., None])
