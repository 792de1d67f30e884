"""Segmentation masks: reading them, and the crop of a scaled image that they decide."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError

from megatron_nepa.config import IGNORED, ConfigError, MaskConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError, open_image
from megatron_nepa.data.index.pairs import require_masks
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
        UnreadableImageError: the mask cannot be read, is no single-channel image, or has another size than the index
            says.
        ConfigError: a value in it is no class.
    """
    name = index.masks[image]
    try:
        with open_image(io.BytesIO((index.root / name).read_bytes())) as mask:
            mode, values = mask.mode, np.array(mask, np.uint8)
    except Exception as error:  # PIL raises a dozen types on damaged files
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error  # PIL names no file here
        raise UnreadableImageError(f"its mask {name} cannot be read ({reason})") from error
    if mode not in ("L", "P"):
        raise UnreadableImageError(f"has a mask {name} with pixels of mode {mode}, not one label each")
    height, width = values.shape
    expected = int(index.width[image]), int(index.height[image])
    if (width, height) != expected:
        raise UnreadableImageError(f"is {expected[0]} x {expected[1]}, its mask {name} {width} x {height}")
    first = int(masks.reduce_zero_label)
    # 0 - 1 wraps round to 255, which is ignored, and a stored 255 stays
    labels = np.where(values == IGNORED, values, values - np.uint8(first))
    unknown = values[(labels >= masks.num_classes) & (labels != IGNORED)]
    if len(unknown):
        raise ConfigError(
            f"the mask {index.root / name} holds the value {unknown[0]}, but the classes are {first} to "
            f"{masks.num_classes - 1 + first}: set --masks.num_classes, or --masks.reduce_zero_label."
        )
    return labels


def check_masks(index: DatasetIndex, masks: MaskConfig, allowed_share: float) -> None:
    """Read up to 256 masks, spread over the data set, before anything depends on them.

    Args:
        index: image and mask pairs.
        masks: what their values mean.
        allowed_share: share of these that may be unreadable or of another size than their image.

    Raises:
        ConfigError: more of them are; a value is no class; the images have no masks.
    """
    require_masks(index)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(_CHECKED, len(index))).astype(int)).tolist()
    bad = []
    for image in chosen:
        try:
            load_mask(index, image, masks)
        except UnreadableImageError as error:
            bad.append(f"{index.where(image)} {error}")
    if len(bad) > allowed_share * len(chosen):
        raise ConfigError(f"{len(bad)} of {len(chosen)} image and mask pairs cannot be used; the first: {bad[0]}.")


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
