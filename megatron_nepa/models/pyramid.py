"""The neck between a plain Vision Transformer and a multi-scale head (mmsegmentation's ``Feature2Pyramid``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from megatron_nepa.parallel.parameters import parameter

# builds the normalisation of so many channels
NormFactory = Callable[[int], nn.Module]
NUM_LEVELS = 4


class FeaturePyramid(nn.Module):
    """Four maps of one size to four times, twice, once and half of it.

    Args:
        width: channels D of every map.
        new_norm: builds the BatchNorm.
    """

    def __init__(self, width: int, new_norm: NormFactory) -> None:
        super().__init__()
        self.upsample1 = Upsample(width)
        self.norm = new_norm(width)
        self.upsample2 = Upsample(width)
        self.upsample = Upsample(width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, D, h, w] to [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w] and [B, D, h // 2, w // 2]."""
        first, second, third, fourth = maps
        quadruple = self.upsample2(nn.functional.gelu(self.norm(self.upsample1(first))))
        return [quadruple, self.upsample(second), third, nn.functional.max_pool2d(fourth, 2)]


class Upsample(nn.Module):
    """Transposed convolution that doubles both sides.

    Args:
        width: channels D, kept.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # of the variance that torch draws for its ConvTranspose2d
        self.weight = parameter((width, width, 2, 2), "images", std=1 / math.sqrt(3 * 4 * width))
        self.bias = parameter((width,), "images", constant=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] to [B, D, 2h, 2w]."""
        return nn.functional.conv_transpose2d(x, self.weight, self.bias, stride=2)
