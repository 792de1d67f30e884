"""Images of any size, made to fit the patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megatron_nepa.config import ConfigError, ModelConfig, require
from megatron_nepa.data.index.headers import UnreadableImageError, open_image

Pixels = NDArray[np.uint8]
_MOST_PATCHES = 10_000  # a head's attention is then 400 MB


def load_image(path: Path, model: ModelConfig, size: int | None = None, square: bool = False) -> Pixels:
    """Read an image and resize it, keeping its ratio, so that both sides are whole numbers of patches.

    EXIF orientation is ignored, as in training.

    Args:
        path: a file that Pillow reads.
        model: that will see the image: its patch size, and its image size where the others would not fit it.
        size: shorter side, pixels, rounded to whole patches; None takes the model's image size.
        square: keep the middle square only.

    Returns:
        [H, W, 3].

    Raises:
        ConfigError: where there is no such image, ``size`` is below a patch or gives too many, or the model's
            learned positions do not fit the result.
    """
    patch = model.patch_size
    shorter = model.image_size if size is None else size
    require(shorter >= patch, f"size {shorter} is less than one patch of {patch} pixels: choose a larger one.")
    image = _open(path)
    if square:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    factor = shorter / min(image.size) / patch
    columns, rows = (max(1, round(side * factor)) for side in image.size)
    require(
        model.position_embedding == "none" or rows == columns == model.grid_size,
        f"this checkpoint has learned positions, which fit {model.image_size} x {model.image_size} pixels only, but "
        f"{path} becomes {rows * patch} x {columns * patch}: give --square and no --size.",
    )
    require(rows * columns > 1, f"{path} is a single patch at size {shorter}, with no next one: choose a larger size.")
    require(
        rows * columns <= _MOST_PATCHES,
        f"{path} becomes {rows} x {columns} patches at size {shorter}, whose attention takes too much memory: choose a "
        f"smaller size, of at most {_MOST_PATCHES:,} patches.",
    )
    return np.array(image.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC))


def to_tensor(pixels: Pixels) -> Tensor:
    """A batch of one as the model reads it: [H, W, 3] of 0 to 255 becomes fp32 [1, 3, H, W] of -1 to 1."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().sub(127.5).div(127.5).contiguous()


def _open(path: Path) -> Image.Image:
    try:
        with open_image(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ConfigError(f"there is no image {path}.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, UnreadableImageError) as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}.") from None
