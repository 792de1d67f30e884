"""Semantic segmentation: the trunk, a multi-scale neck and two heads (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_nepa.config import IGNORED, ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.pyramid import FeaturePyramid, NormFactory
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.models.upernet import FcnHead, UperNetHead, resize
from megatron_nepa.parallel.batch_norm import BatchNorm
from megatron_nepa.parallel.collectives import gather_rows, reduce_from_group
from megatron_nepa.parallel.parameters import initialize_parameters, sum_split_gradients
from megatron_nepa.parallel.rows import RowShard, holds_whole_samples

AUXILIARY_LEVEL = 2  # of the pyramid: the trunk's own resolution
AUXILIARY_CHANNELS = 256
AUXILIARY_WEIGHT = 0.4


class SegmentationOutput(NamedTuple):
    """Result of one micro-batch in training.

    Attributes:
        loss: what is minimised, fp32 scalar, equal on the replica's tensor-parallel ranks.
        parts: detached fp32 [3]: loss of the head, loss of the auxiliary head, share of the labelled pixels whose class
            the head gets right.
    """

    loss: Tensor
    parts: Tensor


class Segmenter(nn.Module):
    """Class scores of every pixel, from the raw outputs of four blocks.

    The heads' parameters are whole on every tensor-parallel rank. Where sequence parallelism leaves a rank whole
    samples, it computes the heads on those; elsewhere every rank computes them on the whole micro-batch.

    Args:
        config: the trunk's shape.
        num_classes: K.
        build: ranks, kernels and seed.
        new_norm: builds the heads' BatchNorm, over all ranks whose heads see different samples.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        build: Build = Build(),
        new_norm: NormFactory = BatchNorm,
    ) -> None:
        super().__init__()
        self.tensor = build.tensor
        self.taps = tapped_blocks(config.num_layers)
        self.trunk = Trunk(config, build)
        self.trunk.norm.requires_grad_(False)  # the blocks' outputs are read before it
        self.decoder = Decoder(config.hidden_size, num_classes, new_norm, build.seed)
        initialize_parameters(self, build.seed, config.init_std, build.tensor)

    def forward(
        self, images: Tensor, sample_index: Tensor, labels: Tensor | None = None
    ) -> SegmentationOutput | Tensor:
        """Loss of a micro-batch, or the logits without labels.

        Args:
            images: images as :meth:`Trunk.forward` takes them.
            sample_index: sample numbers as :meth:`Trunk.forward` takes them.
            labels: int64 [b, H, W] of those images, 255 where a pixel counts for nothing.

        Returns:
            With labels the loss. Without them logits at the images' size, [b, K, H, W]: of all samples, or of this
            rank's whole samples under sequence parallelism.
        """
        size, num_samples = images.shape[2:], sample_index.shape[0]
        output = self.trunk(images, sample_index, sorted(set(self.taps)))
        streams = dict(zip(sorted(set(self.taps)), output.taps, strict=True))
        on_share = holds_whole_samples(num_samples, self.tensor, self.trunk.sequence_parallel)
        maps = [self._map(streams[i], output.rows, size, on_share).to(images.dtype) for i in self.taps]
        if on_share:
            first = output.rows.first // output.period
            sample_index = sample_index[first : first + maps[0].shape[0]]
        logits, auxiliary = self._decode(maps, sample_index, on_share)
        if labels is None:
            return resize(logits, size)

        if labels.shape[0] != logits.shape[0]:  # each rank was given its share, and computes the heads on all
            labels = gather_rows(labels, self.tensor)
        logits, auxiliary = (resize(x.to(_wide(x)), size) for x in (logits, auxiliary))
        num_pixels = num_samples * size[0] * size[1]
        correct = ((logits.argmax(1) == labels).sum(), (labels != IGNORED).sum())
        sums = torch.stack((_loss(logits, labels, num_pixels), _loss(auxiliary, labels, num_pixels), *correct))
        if on_share:
            sums = reduce_from_group(sums, self.tensor)
        loss = sums[0] + AUXILIARY_WEIGHT * sums[1]
        return SegmentationOutput(loss, torch.stack((sums[0], sums[1], sums[2] / sums[3].clamp(min=1))).detach())

    def _map(self, tap: Tensor, rows: RowShard, size: Sequence[int], on_share: bool) -> Tensor:
        """Token rows [n, D] to maps [b, D, h, w] of the samples that this rank's heads see, without the BOS token."""
        config = self.trunk.config
        height, width = size[0] // config.patch_size, size[1] // config.patch_size
        if self.trunk.sequence_parallel and not on_share:
            tap = gather_rows(tap, self.tensor)[: rows.num_rows]
        num_prefix = int(config.bos_token)
        patches = tap.unflatten(0, (-1, num_prefix + height * width))[:, num_prefix:]
        return patches.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def _decode(self, maps: list[Tensor], sample_index: Tensor, on_share: bool) -> tuple[Tensor, Tensor]:
        if not on_share or self.tensor.size == 1:
            return cast("tuple[Tensor, Tensor]", self.decoder(maps, sample_index))
        names, parameters = zip(*self.decoder.named_parameters(), strict=True)
        summed = cast("list[Tensor]", sum_split_gradients(parameters, ("images",), self.tensor))
        decoded = functional_call(self.decoder, dict(zip(names, summed, strict=True)), (maps, sample_index))
        return cast("tuple[Tensor, Tensor]", decoded)


class Decoder(nn.Module):
    """The neck and the two heads: all that segmentation adds to the trunk.

    Args:
        width: channels D of the trunk.
        num_classes: K.
        new_norm: builds a BatchNorm.
        seed: the run's seed.
    """

    def __init__(self, width: int, num_classes: int, new_norm: NormFactory, seed: int) -> None:
        super().__init__()
        self.neck = FeaturePyramid(width, new_norm)
        self.head = UperNetHead(width, num_classes, new_norm, seed)
        self.auxiliary = FcnHead(width, AUXILIARY_CHANNELS, num_classes, new_norm, seed)

    def forward(self, maps: Sequence[Tensor], sample_index: Tensor) -> tuple[Tensor, Tensor]:
        """Four maps [B, D, h, w] to logits [B, K, 4h, 4w] and the auxiliary head's [B, K, h, w]."""
        levels = self.neck(maps)
        return self.head(levels, sample_index), self.auxiliary(levels[AUXILIARY_LEVEL], sample_index)


def tapped_blocks(num_layers: int) -> tuple[int, ...]:
    """The blocks whose outputs the neck reads: after 1/3, 1/2, 2/3 and all of the depth (3, 5, 7, 11 of 12)."""
    return tuple(max(round(num_layers * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1))


def _loss(logits: Tensor, labels: Tensor, num_pixels: int) -> Tensor:
    """Cross-entropy summed over the labelled pixels, divided by all, ignored ones included (as mmsegmentation)."""
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / num_pixels


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
