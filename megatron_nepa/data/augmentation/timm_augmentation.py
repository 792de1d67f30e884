"""timm's augmentations for fine-tuning, every draw keyed by (seed, k).

RandAugment, random erasing, Mixup and CutMix are timm's own code (Apache-2.0); they draw from Python's, numpy's and
torch's global generators, which are seeded from the sample's number around each call and put back afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from megatron_nepa.config import AugmentationConfig, ConfigError, require
from megatron_nepa.data.sampling.order import IntArray
from megatron_nepa.data.workers import worker_pool
from megatron_nepa.parallel.random import derive_key

Pixels = npt.NDArray[np.uint8]


@contextmanager
def seeded(seed: int, purpose: str, k: int) -> Iterator[None]:
    """Python's and numpy's global generators seeded by (seed, purpose, k) inside the block, untouched outside."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from it
    key = derive_key(seed, purpose, k)
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


class RandAugmenter:
    """timm's RandAugment on decoded crops, in worker processes.

    Args:
        config: the augmentation's config, of which rand_augment and workers count.
        seed: the run's seed.

    Raises:
        ConfigError: for a policy that timm does not know.
    """

    def __init__(self, config: AugmentationConfig, seed: int) -> None:
        require(config.rand_augment is not None, "rand_augment is none: there is nothing to apply.")
        self._policy, self._seed, self._workers = str(config.rand_augment), seed, config.workers
        try:
            _transform(self._policy, 1)
        except (AssertionError, ValueError, KeyError) as error:
            raise ConfigError(
                f"augmentation.rand_augment {self._policy} is no policy of timm's RandAugment, such as "
                "rand-m9-mstd0.5-inc1."
            ) from error
        self._pool: ProcessPoolExecutor | None = worker_pool(config.workers) if config.workers else None

    def submit(self, images: Pixels, samples: IntArray) -> list[Future[Pixels]]:
        """Begin to augment a batch.

        Args:
            images: uint8 [n, S, S, 3], already mirrored where they are to be.
            samples: their numbers in the run, int64 [n].

        Returns:
            Futures of the parts of the batch, in order, each uint8 [m, S, S, 3].
        """
        if self._pool is None:
            done: Future[Pixels] = Future()
            done.set_result(_augment(self._policy, self._seed, images, samples))
            return [done]
        count = max(1, min(self._workers, len(images)))
        parts = zip(np.array_split(images, count), np.array_split(samples, count), strict=True)
        return [self._pool.submit(_augment, self._policy, self._seed, *part) for part in parts]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _augment(policy: str, seed: int, images: Pixels, samples: IntArray) -> Pixels:
    transform = _transform(policy, images.shape[1])
    augmented = np.empty_like(images)
    for i, sample in enumerate(samples.tolist()):
        with seeded(seed, "rand_augment", sample):
            augmented[i] = np.asarray(transform(Image.fromarray(images[i])))
    return augmented


@lru_cache(maxsize=2)
def _transform(policy: str, image_size: int) -> RandAugment:
    # the parameters that timm's create_transform passes on: fill colour, translation and interpolation
    mean = (128, 128, 128)
    options = {"translate_const": int(image_size * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    transform: RandAugment = rand_augment_transform(policy, options)
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # the strongest magnitudes keep no bit at all: black in former releases of Pillow, an error in newer ones
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def erase(images: Tensor, samples: IntArray, share: float, seed: int) -> None:
    """timm's random erasing (pixel noise, one rectangle) in place.

    Args:
        images: normalised, fp32 [n, 3, S, S].
        samples: their numbers in the run, int64 [n].
        share: of the images that lose a rectangle.
        seed: the run's seed.
    """
    erasing = RandomErasing(share, mode="pixel", max_count=1, device=images.device)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for image, sample in zip(images, samples.tolist(), strict=True):
            with seeded(seed, "random_erasing", sample):
                torch.manual_seed(derive_key(seed, "random_erasing_noise", sample) >> 1)
                erasing(image)


def mix(
    images: Tensor, labels: Tensor, samples: IntArray, classes: int, config: AugmentationConfig, seed: int
) -> Tensor:
    """Mixup or CutMix within each group of ``config.mix_group`` consecutive samples, in place.

    Args:
        images: fp32 [n, 3, S, S].
        labels: int64 [n].
        samples: their numbers in the run, int64 [n], whole groups.
        classes: number of classes C.
        config: ratios, smoothing and group size.
        seed: the run's seed.

    Returns:
        Soft targets, fp32 [n, C]: each row sums to 1.
    """
    if not (config.mixup or config.cutmix):
        targets: Tensor = mixup_target(labels, classes, 1.0, config.label_smoothing)
        return targets
    mixup = Mixup(
        config.mixup,
        config.cutmix,
        switch_prob=config.cutmix_share,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )
    size = config.mix_group
    parts = []
    for start in range(0, len(images), size):
        with seeded(seed, "mixup", int(samples[start]) // size):
            _, target = mixup(images[start : start + size], labels[start : start + size])
        parts.append(target)
    return torch.cat(parts)
