"""Angles of the 2-D rotary position embedding (the release's, which is DINOv3's)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def rope_angles(
    grid_height: int, grid_width: int, head_size: int, theta: float, num_prefix: int, device: torch.device
) -> Tensor:
    """Rotation angle of every token and channel pair.

    Patch centres are normalised to (-1, 1) per image, so another resolution needs no interpolation. The first quarter
    of the head's channels (paired with the third) turns with y, the second (paired with the fourth) with x.

    Args:
        grid_height: rows of patches of the image.
        grid_width: patches of a row; raster order.
        head_size: channels d of a head, divisible by 4.
        theta: base of the frequencies theta ** (-4 j / d).
        num_prefix: leading tokens that are not rotated (BOS).
        device: device of the result.

    Returns:
        fp32 [num_prefix + grid_height * grid_width, d / 2]; zeros for prefix tokens.
    """
    if torch.compiler.is_compiling():  # a traced tensor must not outlive its trace
        return _angles(grid_height, grid_width, head_size, theta, num_prefix, device)
    return _kept_angles(grid_height, grid_width, head_size, theta, num_prefix, device)


def _angles(
    grid_height: int, grid_width: int, head_size: int, theta: float, num_prefix: int, device: torch.device
) -> Tensor:
    frequency = theta ** -(torch.arange(head_size // 4, dtype=torch.float32, device=device) * 4 / head_size)
    y = (torch.arange(grid_height, dtype=torch.float32, device=device) + 0.5) / grid_height * 2 - 1
    x = (torch.arange(grid_width, dtype=torch.float32, device=device) + 0.5) / grid_width * 2 - 1
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2, 1)  # [patches, (y, x), 1]
    angles = (2 * math.pi * centres * frequency).flatten(1)  # [patches, d / 2]
    return torch.cat((angles.new_zeros(num_prefix, head_size // 2), angles))


_kept_angles = lru_cache(maxsize=16)(_angles)
