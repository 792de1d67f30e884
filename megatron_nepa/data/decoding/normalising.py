"""The one function that turns decoded uint8 pixels into the model's input."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(images: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Mirror the chosen images, map [0, 255] to [-1, 1] (mean = std = 0.5) and cast.

    Args:
        images: uint8 [n, 3, H, W].
        flip: bool [n], the images to mirror; None mirrors none.
        dtype: dtype of the result.

    Returns:
        [n, 3, H, W] of ``dtype``, in memory of its own.
    """
    if flip is not None:
        # picked from a batch of both kinds: on a CPU five times as fast as torch.where of bytes
        both = torch.cat((images, images.flip(3)))
        images = both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * flip)
    # x - 127.5 has 8 significant bits and is exact in bf16, so the division's is the only rounding
    return images.to(dtype).sub_(127.5).div_(127.5)
