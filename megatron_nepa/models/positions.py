"""Fixed sine and cosine positions (Vaswani et al. 2017, of two coordinates as in MoCo v3 and MAE)."""

from __future__ import annotations

import torch
from torch import Tensor


def sine_positions(grid: int, width: int, num_prefix: int) -> Tensor:
    """Position of every token: half the channels turn with x, the other half with y, each sines then cosines.

    Args:
        grid: patches along one side of the image.
        width: channels, divisible by 4.
        num_prefix: leading tokens, whose position is 0 (BOS).

    Returns:
        fp32 [num_prefix + grid * grid, width], on the CPU.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    turns = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * frequency  # [grid, width / 4]
    line = torch.cat((turns.sin(), turns.cos()), dim=1)  # [grid, width / 2]
    x, y = line.expand(grid, grid, -1), line[:, None].expand(grid, grid, -1)
    patches = torch.cat((x, y), dim=-1).flatten(0, 1)
    return torch.cat((patches.new_zeros(num_prefix, width), patches)).float()
