"""Segmentation masks: reading them, and the crop of a scaled image that they decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import IGNORED, ConfigError, MaskConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.mask_file import mask_values
from megatron_nepa.data.index.pairs import require_masks
from megatron_nepa.data.index.storage import read_mask
from megatron_nepa.data.sampling.order import IntArray

CROP_TRIES = 10
_CHECKED = 256  # masks that are read before a run starts


def scaled_size(
    width: npt.NDArray[np.integer],
    height: npt.NDArray[np.integer],
    scale: tuple[int, int],
    ratio: npt.NDArray[np.floating],
) -> IntArray:
    """Height and width of each image scaled into (longer, shorter) x ratio, its shape kept (mmcv's rescale_size).

    Returns:
        int64 [n, 2].
    """
    longer, shorter = ((side * ratio).astype(np.int64) for side in scale)
    sides = np.stack([height, width], axis=1)
    factor = np.minimum(longer / sides.max(axis=1), shorter / sides.min(axis=1))
    size: IntArray = (sides * factor[:, None] + 0.5).astype(np.int64)
    return np.maximum(size, 1)


def load_mask(index: DatasetIndex, image: int, masks: MaskConfig) -> npt.NDArray[np.uint8]:
    """The label of every pixel of image ``image``, uint8 [H, W]: a class, or 255.

    Raises:
        InaccessibleImageError: the mask cannot be had.
        UnreadableImageError: it cannot be read, is of a kind that holds no exact labels, or has another size
            than the index says.
        ConfigError: a value in it is no class.
    """
    name = index.masks[image]
    try:
        values = mask_values(read_mask(index, image))
    except UnreadableImageError as error:
        raise type(error)(f"its mask {name} cannot be read ({error})") from error
    height, width = values.shape
    expected = int(index.width[image]), int(index.height[image])
    if (width, height) != expected:
        raise UnreadableImageError(f"is {expected[0]} x {expected[1]}, its mask {name} {width} x {height}")
    first = int(masks.reduce_zero_label)
    ignored = (values == IGNORED) | (values < first)
    unknown = values[~ignored & (values >= masks.num_classes + first)]
    if len(unknown):
        raise ConfigError(
            f"the mask {index.root / name} holds the value {unknown[0]}, but the classes are {first} to "
            f"{masks.num_classes - 1 + first}: set --masks.num_classes, or --masks.reduce_zero_label."
        )
    # an ignored 0 - 1 may wrap round: its place is taken by 255
    return np.where(ignored, IGNORED, values - first).astype(np.uint8)


def check_masks(index: DatasetIndex, masks: MaskConfig, allowed_share: float, names: Sequence[str]) -> str | None:
    """Read up to 256 masks, spread over the data set, before anything depends on them.

    Args:
        index: image and mask pairs.
        masks: what their values mean.
        allowed_share: share of these that may be unreadable or of another size than their image.
        names: the classes' names.

    Returns:
        A sentence on the classes that never occur in them; None where all do.

    Raises:
        ConfigError: more of them are; a value is no class; no pixel has any class; the images have no masks.
    """
    require_masks(index)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(_CHECKED, len(index))).astype(int)).tolist()
    bad = []
    counts = np.zeros(IGNORED + 1, np.int64)
    for image in chosen:
        try:
            counts += np.bincount(load_mask(index, image, masks).ravel(), minlength=IGNORED + 1)
        except UnreadableImageError as error:
            bad.append(f"{index.where(image)} {error}")
    if len(bad) > allowed_share * len(chosen):
        raise ConfigError(f"{len(bad)} of {len(chosen)} image and mask pairs cannot be used; the first: {bad[0]}.")
    return _say_missing(index, masks, counts, names, len(chosen) - len(bad))


def _say_missing(
    index: DatasetIndex, masks: MaskConfig, counts: npt.NDArray[np.int64], names: Sequence[str], read: int
) -> str | None:
    """What the labels that were read lack, and what the ignored values among them could mean."""
    missing = np.flatnonzero(counts[: masks.num_classes] == 0).tolist()
    if not missing:
        return None
    first = int(masks.reduce_zero_label)
    found = np.flatnonzero(counts[: masks.num_classes]) + first
    hint = f"where {IGNORED} means a class, store the class's own number instead, {missing[0] + first} for example"
    if first:
        hint += "; where 0 is a class, set --masks.reduce_zero_label false"
    ignored = f"0 and {IGNORED}, which are" if first else f"{IGNORED}, which is"
    if not len(found):
        raise ConfigError(
            f"no pixel of the {read} masks of {index.root} that were read has a class: they hold no value besides "
            f"{ignored} ignored; {hint}."
        )
    sentence = (
        f"{index.root}: {len(missing)} of {masks.num_classes} classes never occur in the {read} of {len(index)} masks "
        f"that were read: {_listed([f'{i + first} ({names[i]})' for i in missing])}; they hold the values "
        f"{_listed(list(map(str, found)))}"
    )
    return f"{sentence} and {ignored} ignored; {hint}." if counts[IGNORED] else f"{sentence}."


def _listed(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")


def choose_crop(
    mask: npt.NDArray[np.uint8],
    size: IntArray,
    draws: npt.NDArray[np.float64],
    crop_size: int,
    cat_max_ratio: float,
) -> tuple[IntArray, npt.NDArray[np.uint8]]:
    """The first of some random crops in which no class dominates, else the last (mmsegmentation's ``RandomCrop``).

    Args:
        mask: labels at the stored size, [H, W].
        size: height and width of the scaled image, [2].
        draws: in [0, 1), a corner's height and width a row, [tries, 2].
        crop_size: side S of the crop.
        cat_max_ratio: share of one class at which it dominates.

    Returns:
        Corner (y, x) in the scaled image, and the mask's labels in the crop (nearest), at most crop_size a side.
    """
    room = np.maximum(size - crop_size, 0)
    extent = np.minimum(size, crop_size)
    for draw in draws:
        corner = np.floor(draw * (room + 1)).astype(np.int64)
        # centres of the scaled pixels in stored pixels
        rows, columns = (
            ((np.arange(corner[a], corner[a] + extent[a]) + 0.5) * mask.shape[a] / size[a]).astype(np.int64)
            for a in (0, 1)
        )
        crop = mask[np.ix_(rows, columns)]
        counts = np.bincount(crop.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
            break
    return corner, crop  # the last draw's, where none passed
