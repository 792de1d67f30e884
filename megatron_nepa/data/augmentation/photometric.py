"""Photometric distortion of segmentation training, as mmsegmentation's ``PhotoMetricDistortion`` defines it.

Ours rather than torchvision's ColorJitter, whose draws are neither mmsegmentation's nor keyed by the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nepa.parallel.random import derive_key, uniform_tensor

_BRIGHTNESS = 32.0  # grey levels, either way
_FACTOR = (0.5, 1.5)  # contrast and saturation
_HUE = 36.0  # degrees, either way


def distort(images: Tensor, samples: Tensor, seed: int) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, each with probability 1/2.

    Contrast comes before or after saturation and hue, as a coin decides.

    Args:
        images: uint8 [n, 3, H, W].
        samples: their numbers in the run, int64 [n], on the same device.
        seed: the run's seed.

    Returns:
        fp32 [n, 3, H, W], whole grey levels in [0, 255].
    """
    draw = uniform_tensor(derive_key(seed, "photometric"), samples, 9)[:, :, None, None, None].unbind(
        1
    )  # 9 x [n,1,1,1]
    on = [coin < 0.5 for coin in draw[:4]]
    brightness = torch.where(on[0], _BRIGHTNESS * (2 * draw[4] - 1), 0.0)
    contrast, saturation = (
        torch.where(which, _FACTOR[0] + (_FACTOR[1] - _FACTOR[0]) * amount, 1.0)
        for which, amount in ((on[1], draw[5]), (on[2], draw[6]))
    )
    hue = torch.where(on[3], _HUE * (2 * draw[7] - 1), 0.0)
    first = draw[8] < 0.5

    pixels = _levels(images.float() + brightness)
    pixels = _levels(pixels * torch.where(first, contrast, 1.0))
    pixels = _levels(_saturate_and_turn(pixels, saturation, hue))
    return _levels(pixels * torch.where(first, 1.0, contrast))


def _levels(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255)


def _saturate_and_turn(pixels: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Multiply the saturation of HSV (at most to 1) and add to its hue.

    Args:
        pixels: [n, 3, H, W].
        saturation: factor, [n, 1, 1, 1].
        hue: degrees, [n, 1, 1, 1].
    """
    value, chroma = pixels.amax(1, keepdim=True), pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    safe = chroma.clamp(min=1e-6)  # grey has no hue: whatever it gets is multiplied by its chroma of 0
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = sector + hue / 60
    chroma = torch.minimum(chroma * saturation, value)
    offset = (torch.arange(5.0, 0.0, -2.0, device=pixels.device).view(1, 3, 1, 1) + sector) % 6  # [n, 3, H, W]
    return value - chroma * torch.minimum(offset, 4 - offset).clamp(0, 1)
