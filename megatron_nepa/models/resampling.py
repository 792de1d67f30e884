"""Weights of a trunk for another patch size or another image size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def resample_patch_kernel(weight: Tensor, patch_size: int) -> Tensor:
    """A patch embedding's kernel for patches of another size (FlexiViT's PI-resize, Beyer et al. 2023, section 3.4).

    Where the patch grows, the new kernel gives a patch that was enlarged bilinearly the embedding that the old kernel
    gives the patch itself; where it shrinks, the nearest in the least-squares sense.

    Args:
        weight: [D, C, p, p].
        patch_size: new side.

    Returns:
        [D, C, patch_size, patch_size] in fp32.
    """
    old = weight.shape[-1]
    unit = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    enlarged = nn.functional.interpolate(unit, (patch_size, patch_size), mode="bilinear", antialias=True)
    enlarge = enlarged.flatten(1).t()  # [new, old]: old pixels to new pixels
    flat = weight.detach().double().cpu().flatten(2)  # [D, C, old]
    resampled = flat @ torch.linalg.pinv(enlarge)
    return resampled.view(*weight.shape[:2], patch_size, patch_size).float()


def resample_positions(positions: Tensor, old_grid: int, new_grid: int) -> Tensor:
    """Learned positions for another square grid of patches; in fp32 on the host, without a gradient.

    Args:
        positions: [prefix + old_grid**2, D]; those of prefix tokens come first and stay.
        old_grid: patches along a side.
        new_grid: patches along a side of the result.

    Returns:
        [prefix + new_grid**2, D].
    """
    return interpolate_positions(positions.detach().cpu(), (old_grid, old_grid), (new_grid, new_grid))


def interpolate_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Learned positions for another grid of patches, bicubic, as BEiT and MAE do for segmentation.

    Args:
        positions: [prefix + patches, D]; those of prefix tokens come first and stay.
        old_grid: rows and columns of the patches.
        new_grid: rows and columns of the result.

    Returns:
        [prefix + new patches, D] in fp32.
    """
    positions = positions.float()
    num_prefix = positions.shape[0] - old_grid[0] * old_grid[1]
    of_patches = positions[num_prefix:].t().unflatten(1, old_grid)[None]  # [1, D, h, w]
    resized = nn.functional.interpolate(of_patches, new_grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:num_prefix], resized.flatten(2)[0].t()))
