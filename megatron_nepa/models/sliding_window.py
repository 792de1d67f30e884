"""Segmentation logits of images of any size: the whole image at once, or windows that slide over it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# images [B, C, h, w] to logits [B, K, h, w]
PixelModel = Callable[[Tensor], Tensor]


def whole_image_logits(model: PixelModel, image: Tensor, multiple: int) -> Tensor:
    """Logits of one pass over the whole image.

    Args:
        model: its sides must be multiples of ``multiple``.
        image: [1, C, H, W], padded with zeros at the right and bottom, as training pads small images.
        multiple: the patch size, to a multiple of which the sides are padded.

    Returns:
        [1, K, H, W].
    """
    height, width = image.shape[2:]
    return model(_pad(image, -(-height // multiple) * multiple, -(-width // multiple) * multiple))[..., :height, :width]


def sliding_window_logits(model: PixelModel, image: Tensor, window: int, stride: int) -> Tensor:
    """Logits averaged over square windows; the last row and column of them end at the image's border.

    An image smaller than the window is padded with zeros at the right and bottom, as training pads it.

    Args:
        model: called on one window of every image at a time, [B, C, window, window].
        image: [B, C, H, W].
        window: side of a window, pixels.
        stride: from one window to the next, pixels, at most ``window``.

    Returns:
        [B, K, H, W], summed in fp32 or wider.
    """
    height, width = image.shape[2:]
    image = _pad(image, max(height, window), max(width, window))
    total: Tensor | None = None
    count = torch.zeros(image.shape[2:], device=image.device)
    for top in window_starts(image.shape[2], window, stride):
        for left in window_starts(image.shape[3], window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = model(image[place])
            if total is None:
                dtype = torch.promote_types(logits.dtype, torch.float32)
                total = torch.zeros(*logits.shape[:2], *image.shape[2:], dtype=dtype, device=image.device)
            total[place] += logits
            count[place] += 1
    assert total is not None
    return (total / count)[..., :height, :width]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side of ``length`` pixels, the last one moved back to end with it.

    Raises:
        ValueError: where windows would leave gaps.
    """
    if not 0 < stride <= window <= length:
        raise ValueError(f"windows of {window} every {stride} pixels do not cover a side of {length}")
    steps = -(-(length - window) // stride)
    return [min(i * stride, length - window) for i in range(steps + 1)]


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))
