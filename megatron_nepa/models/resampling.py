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
    """Learned positions for another grid of patches, bicubic, as BEiT and MAE do for segmentation.

    Args:
        positions: [prefix + old_grid**2, D]; those of prefix tokens come first and stay.
        old_grid, new_grid: patches along a side.

    Returns:
        [prefix + new_grid**2, D] in fp32.
    """
    positions = positions.detach().float().cpu()
    num_prefix = positions.shape[0] - old_grid**2
    of_patches = positions[num_prefix:].t().view(1, -1, old_grid, old_grid)
    resized = nn.functional.interpolate(of_patches, (new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat((positions[:num_prefix], resized.flatten(2)[0].t()))
