"""Labelled, augmented micro-batches for fine-tuning, in the order and with the exactness of pre-training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from megatron_nepa.config import AugmentationConfig, DataConfig, divisors, multiples_around, one_of, require
from megatron_nepa.data.augmentation.timm_augmentation import Pixels, RandAugmenter, erase, mix
from megatron_nepa.data.decoding.crop_stream import CropStream
from megatron_nepa.data.decoding.normalising import normalise
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.loaders.pretraining import Batch
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import IntArray, flips
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.data.transfer import to_device

_AHEAD = 2  # micro-batches that RandAugment works on while the model trains


class FinetuningLoader:
    """Iterates over the augmented micro-batches of one rank forever; the same for every grid, as in pre-training.

    RandomResizedCrop (bicubic), flip, RandAugment, normalisation, random erasing, then Mixup or CutMix. RandAugment is
    PIL's work: where it is on, images are decoded on the CPU, in this process, and augmented in worker processes.

    Args:
        index: the images; every label must be known.
        config: crop, flip and decoder settings.
        augmentation: RandAugment, erasing, mixing, smoothing.
        image_size: side S of the crops.
        num_classes: classes C of the targets.
        feed: which samples this rank loads, and where they go.

    Raises:
        ConfigError: labels missing or beyond num_classes, or mixing groups that this rank's share would cut.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        augmentation: AugmentationConfig,
        image_size: int,
        num_classes: int,
        feed: Feed,
    ) -> None:
        label, found, share = np.asarray(index.label), index.found_labels, feed.share
        require(bool((found >= 0).all()), f"{index.root} has images without a label: fine-tuning needs one for each.")
        require(
            int(found[-1]) < num_classes,
            f"{index.root} has label {int(found[-1])}, but the classifier has {num_classes} classes.",
        )
        check_mixing(augmentation, share)
        self._label, self._share, self._seed, self._num_classes = label, share, feed.seed, num_classes
        self._augmentation, self._flip = augmentation, config.horizontal_flip
        self._device, self._dtype = feed.device, feed.dtype
        self._augmenter = RandAugmenter(augmentation, feed.seed) if augmentation.rand_augment else None
        options = DecoderOptions.of(config, index, torch.device("cpu") if self._augmenter else feed.device)
        self._crops = CropStream(index, config, image_size, feed, options, "bicubic")
        self._micro_batch = self._crops.micro_batch  # the next to be handed out; crops runs ahead of it
        self._pending: deque[tuple[list[Future[Pixels]], IntArray]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        share = self._share
        samples = share.local_samples(self._micro_batch)
        images, numbers = self._augmented() if self._augmenter else self._plain(samples)
        if self._augmentation.random_erasing > 0:
            erase(images, samples, self._augmentation.random_erasing, self._seed)
        labels = to_device(self._label[numbers].astype(np.int64), self._device)
        targets = mix(images, labels, samples, self._num_classes, self._augmentation, self._seed)
        first = share.first_sample(self._micro_batch)
        self._micro_batch += 1
        sample_index = torch.arange(first, first + share.micro_batch_size, device=self._device)
        return Batch(images.to(self._dtype), sample_index, targets, numbers)

    @property
    def consumed_samples(self) -> int:
        """Samples of the completed steps: the loader's whole state."""
        return self._share.consumed_samples(self._micro_batch)

    @property
    def num_bad_images(self) -> int:
        """Samples of this rank that another image had to stand in for."""
        return self._crops.num_bad_images

    def close(self) -> None:
        """Free the pipeline, its threads and the worker processes."""
        self._crops.close()
        if self._augmenter:
            self._augmenter.close()

    def _plain(self, samples: IntArray) -> tuple[Tensor, IntArray]:
        """Normalised fp32 [b, 3, S, S] without RandAugment."""
        images, numbers = next(self._crops)
        flip = to_device(flips(self._seed, samples), self._device) if self._flip else None
        return normalise(images, flip, torch.float32), numbers

    def _augmented(self) -> tuple[Tensor, IntArray]:
        """Normalised fp32 [b, 3, S, S], after RandAugment that began some micro-batches ago."""
        assert self._augmenter is not None
        while len(self._pending) <= _AHEAD:
            samples = self._share.local_samples(self._crops.micro_batch)
            images, numbers = next(self._crops)
            pixels = images.permute(0, 2, 3, 1).numpy()  # [b, S, S, 3]
            if self._flip:
                pixels = np.where(flips(self._seed, samples)[:, None, None, None], pixels[:, :, ::-1], pixels)
            self._pending.append((self._augmenter.submit(np.ascontiguousarray(pixels), samples), numbers))
        parts, numbers = self._pending.popleft()
        augmented = to_device(np.concatenate([part.result() for part in parts]), self._device)
        return normalise(augmented.permute(0, 3, 1, 2).contiguous(), None, torch.float32), numbers


def check_mixing(augmentation: AugmentationConfig, share: Share) -> None:
    """Refuse mixing groups that a rank's share of a micro-batch would cut."""
    mixing = augmentation.mixup > 0 or augmentation.cutmix > 0
    require(
        not mixing or share.local_size % augmentation.mix_group == 0,
        f"--augmentation.mix_group {augmentation.mix_group} does not divide the {share.local_size} images that a "
        f"rank decodes of a micro-batch: {_possible_groups(augmentation.mix_group, share)}.",
    )


def _possible_groups(mix_group: int, share: Share) -> str:
    """A group that the rank's share of a micro-batch holds a whole number of, or else a micro-batch for this one."""
    groups = [size for size in divisors(share.local_size) if size % 2 == 0 and size < mix_group]
    if groups:
        return f"take --augmentation.mix_group {groups[-1]}"
    micro_batches = multiples_around(share.micro_batch_size, mix_group * share.tensor_size)
    return f"take --micro_batch_size {one_of(micro_batches)}"
