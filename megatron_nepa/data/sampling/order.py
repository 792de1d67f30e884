"""Which image sample k of a run is, and the crop and flip that it gets: pure functions of (seed, k).

Sample k is position k mod N of the permutation of epoch k // N, so any world size, micro-batch or restart sees the
same sequence, and the state of the data is one integer. The permutation of many images is computed place by place, in
constant memory. The crop follows torchvision's ``RandomResizedCrop.get_params`` (BSD-3) try for try, with draws keyed
by k.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import require
from megatron_nepa.data.sampling.bijection import KeyedBijection
from megatron_nepa.parallel.random import derive_key, uniform

IntArray = npt.NDArray[np.int64]

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_CROP, _FLIP, _PERMUTATION, _BIJECTION = "random_resized_crop", "horizontal_flip", "permutation", "bijection"

# what a run's order is computed by, which it keeps to its end: 1 shuffles sets of any size; 2 shuffles sets of up to
# LARGEST_SHUFFLE images and computes the order of larger ones place by place
ORDER_VERSION = 2
LARGEST_SHUFFLE = 2**20  # 8 MB and a third of a second an epoch; small Feistel networks are visibly biased


def require_known_order(version: int, source: str) -> None:
    """Refuse to continue a run in an order that this release cannot compute.

    Args:
        version: of the order that the run was begun with.
        source: what holds it, for the message.

    Raises:
        ConfigError: the version is unknown.
    """
    require(
        1 <= version <= ORDER_VERSION,
        f"{source} is of a run whose images come in order version {version}; this release knows versions 1 to "
        f"{ORDER_VERSION}: continue it with the release that wrote it, or start from its weights with --init_from.",
    )


class SampleOrder(Protocol):
    """Which image each sample of a run shows."""

    def images(self, sample: IntArray, skip: int = 0) -> IntArray:
        """The image of each sample, int64 [n].

        Args:
            sample: sample numbers k, int64 [n].
            skip: how many images further on, for a sample whose own image cannot be decoded.
        """

    def source(self, sample: IntArray) -> IntArray:
        """The number of the set that each sample is drawn from, int64 [n]; zeros where there is one."""

    def choices(self, source: int) -> int:
        """How many images a sample of that set may show."""


def permutation(seed: int, epoch: int, num_images: int) -> IntArray:
    """The shuffled order of epoch ``epoch``: every image once.

    Returns:
        int64 [num_images], read-only. The same on every platform and numpy version: it sorts 48-bit keyed draws.
    """
    high, low = uniform(derive_key(seed, _PERMUTATION, epoch), np.arange(num_images), 2).T.astype(np.float64) * 2.0**24
    # a stable sort: should two draws tie, every machine decides alike
    order = np.argsort((high * 2.0**24 + low).astype(np.int64), kind="stable")
    order.setflags(write=False)
    return order


class SetOrder:
    """The order of one set: an epoch after the other, each image once in it.

    It keeps the two epochs that a batch may straddle: of a shuffle, 8 bytes an image. Threads may share it.

    Args:
        seed: of the order.
        num_images: images N of the set.
        version: of the order, 1 or 2: the one that the run was begun with.
    """

    def __init__(self, seed: int, num_images: int, version: int = ORDER_VERSION) -> None:
        self._num_images, self._version, self._lock = num_images, version, threading.Lock()
        self._permutation = lru_cache(maxsize=2)(partial(permutation, seed, num_images=num_images))
        self._bijection = lru_cache(maxsize=2)(lambda epoch: KeyedBijection.derive(seed, _BIJECTION, epoch, num_images))

    def images(self, sample: IntArray, skip: int = 0) -> IntArray:
        """The image in [0, N) that each sample shows; ``skip`` goes on in the same epoch's permutation."""
        epoch, position = np.divmod(sample, self._num_images)
        position = (position + skip) % self._num_images
        image = np.empty_like(position)
        computed = self._version > 1 and self._num_images > LARGEST_SHUFFLE
        for value in np.unique(epoch):
            rows, number = epoch == value, int(value)
            places = position[rows]
            image[rows] = self._bijection(number)(places) if computed else self._shuffle(number)[places]
        return image

    def _shuffle(self, epoch: int) -> IntArray:
        with self._lock:  # of several threads that come to an epoch one computes it
            return self._permutation(epoch)

    def source(self, sample: IntArray) -> IntArray:
        """Zeros: there is one set."""
        return np.zeros_like(sample)

    def choices(self, source: int) -> int:
        """All of its images."""
        return self._num_images


set_order = lru_cache(maxsize=16)(SetOrder)  # of two loaders, or of the sources of a mixture


def image_of_sample(
    seed: int, sample: IntArray, num_images: int, skip: int = 0, version: int = ORDER_VERSION
) -> IntArray:
    """The image that each sample of a run on one set shows.

    Args:
        seed: the run's seed.
        sample: sample numbers k, int64 [n].
        num_images: images N of the index.
        skip: positions further on in the same epoch's permutation, for a sample whose own image cannot be decoded.
        version: of the order, 1 or 2: the one that the run was begun with.

    Returns:
        int64 [n] in [0, num_images).
    """
    return set_order(seed, num_images, version).images(sample, skip)


def crop_boxes(
    seed: int,
    sample: IntArray,
    width: npt.NDArray[np.integer],
    height: npt.NDArray[np.integer],
    scale_min: float,
) -> npt.NDArray[np.int32]:
    """Random crop of each sample: torchvision's RandomResizedCrop with ratio 3/4 to 4/3.

    Up to 10 tries draw an area share in [scale_min, 1] and a log-uniform ratio; the first box that fits is
    placed uniformly. If none fits, the largest centred box of an allowed ratio.

    Args:
        seed: the run's seed.
        sample: sample numbers k, int64 [n].
        width: stored width of each sample's image, [n].
        height: stored height, [n].
        scale_min: least share of the image's area.

    Returns:
        int32 [n, 4]: x, y, width, height, inside the image.
    """
    draws = uniform(derive_key(seed, _CROP), sample, 2 * _TRIES + 2).astype(np.float64)
    image_width, image_height = width.astype(np.int64), height.astype(np.int64)
    rows = np.arange(len(sample))

    area = (image_width * image_height)[:, None] * (scale_min + (1.0 - scale_min) * draws[:, 0 : 2 * _TRIES : 2])
    log_low, log_high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratio = np.exp(log_low + (log_high - log_low) * draws[:, 1 : 2 * _TRIES : 2])
    tried_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # [n, tries]; rint rounds halves as Python's round
    tried_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_width > 0) & (tried_width <= image_width[:, None])
    fits &= (tried_height > 0) & (tried_height <= image_height[:, None])
    first = fits.argmax(axis=1)
    crop_width, crop_height = tried_width[rows, first], tried_height[rows, first]
    x = np.floor(draws[:, -1] * (image_width - crop_width + 1)).astype(np.int64)
    y = np.floor(draws[:, -2] * (image_height - crop_height + 1)).astype(np.int64)

    none_fits = ~fits.any(axis=1)
    if none_fits.any():
        whole_width, whole_height = _largest_allowed(image_width, image_height)
        crop_width = np.where(none_fits, whole_width, crop_width)
        crop_height = np.where(none_fits, whole_height, crop_height)
        x = np.where(none_fits, (image_width - crop_width) // 2, x)
        y = np.where(none_fits, (image_height - crop_height) // 2, y)
    return np.stack([x, y, crop_width, crop_height], axis=1).astype(np.int32)


def _largest_allowed(width: IntArray, height: IntArray) -> tuple[IntArray, IntArray]:
    """Size of the largest box whose ratio is allowed, for images of any ratio."""
    ratio = width / height
    too_tall, too_wide = ratio < _RATIO[0], ratio > _RATIO[1]
    # at least one pixel: a 1 x 2 image would otherwise round to nothing
    crop_width = np.where(too_wide, np.maximum(np.rint(height * _RATIO[1]).astype(np.int64), 1), width)
    crop_height = np.where(too_tall, np.maximum(np.rint(width / _RATIO[0]).astype(np.int64), 1), height)
    return crop_width, crop_height


def flip_key(seed: int) -> int:
    """Key of the flip's draw: sample k is mirrored where ``uniform(flip_key(seed), k, 1) < 0.5``."""
    return derive_key(seed, _FLIP)


def flips(seed: int, sample: IntArray) -> npt.NDArray[np.bool_]:
    """Whether each sample is mirrored, bool [n]."""
    return uniform(flip_key(seed), sample, 1)[:, 0] < 0.5
