"""Segmentation heads as mmsegmentation has them: UPerNet (Xiao et al. 2018) and the auxiliary convolutional head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_nepa.models.draws import channel_dropout_factors
from megatron_nepa.models.pyramid import NUM_LEVELS, NormFactory
from megatron_nepa.parallel.parameters import parameter

POOL_SCALES = (1, 2, 3, 6)
DROPOUT = 0.1


class UperNetHead(nn.Module):
    """Pyramid pooling of the coarsest map, a top-down path, and the fusion of all levels at the finest one's size.

    Args:
        width: channels D of every level, and of the head.
        num_classes: K.
        new_norm: builds a BatchNorm.
        seed: of the run, for the dropout of training mode.
    """

    def __init__(self, width: int, num_classes: int, new_norm: NormFactory, seed: int) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(ConvNormRelu(width, width, 1, new_norm) for _ in POOL_SCALES)
        self.bottleneck = ConvNormRelu((1 + len(POOL_SCALES)) * width, width, 3, new_norm)
        self.lateral = nn.ModuleList(ConvNormRelu(width, width, 1, new_norm) for _ in range(NUM_LEVELS - 1))
        self.smooth = nn.ModuleList(ConvNormRelu(width, width, 3, new_norm) for _ in range(NUM_LEVELS - 1))
        self.fusion = ConvNormRelu(NUM_LEVELS * width, width, 3, new_norm)
        self.classifier = PixelClassifier(width, num_classes, "upernet", seed)

    def forward(self, levels: Sequence[Tensor], sample_index: Tensor) -> Tensor:
        """Logits at the finest level.

        Args:
            levels: [B, D, h_i, w_i], finest first.
            sample_index: sample numbers, int64 [B].

        Returns:
            [B, K, h_0, w_0].
        """
        paths = [lateral(level) for lateral, level in zip(self.lateral, levels[:-1], strict=True)]
        paths.append(self._pool(levels[-1]))
        for i in range(NUM_LEVELS - 1, 0, -1):  # from the coarsest down
            paths[i - 1] = paths[i - 1] + resize(paths[i], paths[i - 1].shape[2:])
        smoothed = [smooth(path) for smooth, path in zip(self.smooth, paths[:-1], strict=True)]
        size = smoothed[0].shape[2:]
        joined = [smoothed[0], *(resize(path, size) for path in (*smoothed[1:], paths[-1]))]
        logits: Tensor = self.classifier(self.fusion(torch.cat(joined, dim=1)), sample_index)
        return logits

    def _pool(self, x: Tensor) -> Tensor:
        """Averages over 1, 2 x 2, 3 x 3 and 6 x 6 cells of the coarsest map, beside the map itself: [B, D, h, w]."""
        pooled = [
            resize(conv(nn.functional.adaptive_avg_pool2d(x, scale)), x.shape[2:])
            for conv, scale in zip(self.pooled, POOL_SCALES, strict=True)
        ]
        joined: Tensor = self.bottleneck(torch.cat((x, *pooled), dim=1))
        return joined


class FcnHead(nn.Module):
    """One convolution and a classifier on a single level, whose loss helps the trunk to train.

    Args:
        width: channels D of the level.
        hidden: channels of the head.
        num_classes: K.
        new_norm: builds a BatchNorm.
        seed: of the run, for the dropout of training mode.
    """

    def __init__(self, width: int, hidden: int, num_classes: int, new_norm: NormFactory, seed: int) -> None:
        super().__init__()
        self.conv = ConvNormRelu(width, hidden, 3, new_norm)
        self.classifier = PixelClassifier(hidden, num_classes, "fcn", seed)

    def forward(self, level: Tensor, sample_index: Tensor) -> Tensor:
        """[B, D, h, w] to logits [B, K, h, w]; sample numbers int64 [B]."""
        logits: Tensor = self.classifier(self.conv(level), sample_index)
        return logits


class ConvNormRelu(nn.Module):
    """Convolution without bias at stride 1, BatchNorm, ReLU.

    Args:
        in_channels: channels that enter the convolution.
        out_channels: channels that leave it.
        kernel_size: odd; the map keeps its size.
        new_norm: builds the BatchNorm.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, new_norm: NormFactory) -> None:
        super().__init__()
        fan_out = out_channels * kernel_size**2
        self.weight = parameter(
            (out_channels, in_channels, kernel_size, kernel_size), "images", std=math.sqrt(2 / fan_out)
        )
        self.norm = new_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] to [B, out, h, w]."""
        return nn.functional.relu(self.norm(nn.functional.conv2d(x, self.weight, padding="same")))


class PixelClassifier(nn.Module):
    """Class scores of every pixel, from channels of which training drops a tenth.

    Args:
        width: channels D.
        num_classes: K.
        purpose: name of the head in the draws of the run.
        seed: the run's seed.
    """

    def __init__(self, width: int, num_classes: int, purpose: str, seed: int) -> None:
        super().__init__()
        self.purpose = purpose
        self.seed = seed
        self.weight = parameter((num_classes, width, 1, 1), "images", std=0.01)
        self.bias = parameter((num_classes,), "images", constant=0.0)

    def forward(self, x: Tensor, sample_index: Tensor) -> Tensor:
        """[B, D, h, w] to [B, K, h, w]; sample numbers int64 [B]."""
        if self.training:
            factors = channel_dropout_factors(DROPOUT, x.shape[1], self.purpose, self.seed, sample_index)
            x = x * factors[:, :, None, None].to(x.dtype)
        return nn.functional.conv2d(x, self.weight, self.bias)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] to [B, C, *size], bilinear between pixel centres (align_corners False)."""
    return nn.functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
