"""Segmentation masks: reading them, and the crop of a scaled image that they decide."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_nepa.config import require
from megatron_nepa.data.evaluation import Side
from megatron_nepa.data.headers import UnreadableImageError
from megatron_nepa.data.index import DatasetIndex
from megatron_nepa.data.order import IntArray

IGNORED = 255  # label of pixels that count for nothing
CROP_TRIES = 10


@dataclass(frozen=True)
class SegmentationConfig:
    """Geometry of training crops and evaluation images."""

    # side of the square training crop
    crop_size: int = 518
    # longer and shorter side that an image is scaled into, before the random ratio
    scale: tuple[int, int] = (2048, 512)
    # range of the random ratio that multiplies the scale in training
    ratio: tuple[float, float] = (0.5, 2.0)
    # largest share of one class in a crop, while there are tries left
    cat_max_ratio: float = 0.75
    # mask value 0 is no class: it is ignored, and the others count from 0 (ADE20K)
    reduce_zero_label: bool = True

    def __post_init__(self) -> None:
        require(self.crop_size >= 1, f"crop_size is {self.crop_size}; it must be at least 1.")
        require(
            0 < self.ratio[0] <= self.ratio[1], f"ratio is {self.ratio}; it must be a rising range of positive numbers."
        )


def scaled_size(width: Side, height: Side, scale: tuple[int, int], ratio: npt.NDArray[np.floating]) -> IntArray:
    """Height and width of each image scaled into (longer, shorter) x ratio, its shape kept (mmcv's rescale_size).

    Returns:
        int64 [n, 2].
    """
    longer, shorter = ((side * ratio).astype(np.int64) for side in scale)
    sides = np.stack([height, width], axis=1)
    factor = np.minimum(longer / sides.max(axis=1), shorter / sides.min(axis=1))
    size: IntArray = (sides * factor[:, None] + 0.5).astype(np.int64)
    return np.maximum(size, 1)


def load_mask(index: DatasetIndex, image: int, reduce_zero_label: bool) -> npt.NDArray[np.uint8]:
    """The label of every pixel of image ``image``, uint8 [H, W].

    Raises:
        UnreadableImageError: the mask cannot be read, is no single-channel image, or has another size than the index
            says.
    """
    name = index.masks[image]
    try:
        with Image.open(io.BytesIO((index.root / name).read_bytes())) as mask:
            mode, labels = mask.mode, np.array(mask, np.uint8)
    except Exception as error:  # PIL raises a dozen types on damaged files
        raise UnreadableImageError(f"its mask {name} cannot be read ({error})") from error
    if mode not in ("L", "P"):
        raise UnreadableImageError(f"its mask {name} has pixels of mode {mode}, not one label each")
    height, width = labels.shape
    expected = int(index.width[image]), int(index.height[image])
    if (width, height) != expected:
        raise UnreadableImageError(f"is {expected[0]} x {expected[1]}, its mask {name} {width} x {height}")
    return labels - np.uint8(1) if reduce_zero_label else labels  # 0 - 1 wraps round to 255, which is IGNORED


def choose_crop(
    mask: npt.NDArray[np.uint8], size: IntArray, draws: npt.NDArray[np.float64], config: SegmentationConfig
) -> tuple[IntArray, npt.NDArray[np.uint8]]:
    """The first of some random crops in which no class dominates, else the last (mmsegmentation's ``RandomCrop``).

    Args:
        mask: labels at the stored size, [H, W].
        size: height and width of the scaled image, [2].
        draws: in [0, 1), a corner's height and width a row, [tries, 2].
        config: crop_size and cat_max_ratio.

    Returns:
        Corner (y, x) in the scaled image, and the mask's labels in the crop (nearest), at most crop_size a side.
    """
    room = np.maximum(size - config.crop_size, 0)
    extent = np.minimum(size, config.crop_size)
    for draw in draws:
        corner = np.floor(draw * (room + 1)).astype(np.int64)
        # centres of the scaled pixels in stored pixels
        rows, columns = (
            ((np.arange(corner[a], corner[a] + extent[a]) + 0.5) * mask.shape[a] / size[a]).astype(np.int64)
            for a in (0, 1)
        )
        crop = mask[np.ix_(rows, columns)]
        counts = np.bincount(crop.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < config.cat_max_ratio * counts.sum():
            break
    return corner, crop  # the last draw's, where none passed
