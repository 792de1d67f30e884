"""Which image files can be segmentation masks, and the labels in them exactly as they were stored."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from megatron_nepa.data.index.headers import UnreadableImageError, open_image

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # tags
_MODES = {"1", "L", "P", "I;16", "I;16B"}


def mask_size(content: bytes) -> tuple[int, int]:
    """Width and height of a mask from its header; no pixel is decoded.

    Args:
        content: the whole file.

    Raises:
        UnreadableImageError: it is damaged, or of a kind whose pixels are not one exact label each.
    """
    with _open(content) as mask:
        return mask.size


def mask_values(content: bytes) -> npt.NDArray[np.integer]:
    """The stored number of every pixel, [H, W], uint8 or uint16: palette indices stay indices, grey stays unscaled.

    Args:
        content: the whole file.

    Raises:
        UnreadableImageError: it is damaged, or of a kind whose pixels are not one exact label each.
    """
    with _open(content) as mask:
        try:
            values: npt.NDArray[Any] = np.array(mask)
        except Exception as error:  # PIL raises a dozen types on damaged files
            raise UnreadableImageError(str(error)) from error
        if mask.mode == "L" and mask.format == "PNG":
            depth = content[24]  # of IHDR: PIL stretches 2 and 4 bits of grey over 0 to 255
            values = values // (255 // (2**depth - 1))
    return values.astype(np.uint16 if values.dtype.itemsize > 1 else np.uint8)


def _open(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not used
            mask = open_image(io.BytesIO(content))
            problem = _problem(mask)
    except UnidentifiedImageError as error:
        raise UnreadableImageError("it is no image") from error  # PIL names no file here
    except UnreadableImageError:
        raise
    except Exception as error:  # PIL raises a dozen types on damaged files
        raise UnreadableImageError(str(error) or type(error).__name__) from error
    if problem:
        mask.close()
        raise UnreadableImageError(problem)
    return mask


def _problem(mask: Image.Image) -> str:
    """Why the pixels are not one exact label each, or nothing."""
    if mask.format in ("JPEG", "MPO"):
        return "a JPEG changes the labels that it stores: write masks as PNG from their source"
    if mask.format not in ("PNG", "TIFF"):
        return f"masks are PNG or TIFF, not {mask.format}: write it as PNG"
    if mask.mode not in _MODES:
        return f"it has pixels of mode {mask.mode}, not one label each: write it as PNG of one channel"
    if getattr(mask, "n_frames", 1) > 1:
        return f"it holds {getattr(mask, 'n_frames', 1)} pictures: write one"
    if mask.format == "TIFF":
        tags: Any = getattr(mask, "tag_v2")  # noqa: B009  # only TIFF images have it
        bits, photometric = tags.get(_TIFF_BITS, (1,)), tags.get(_TIFF_PHOTOMETRIC)
        if tuple(bits) not in ((8,), (16,)) or photometric not in (1, 3):
            return f"a TIFF of {bits[0]} bits and photometric interpretation {photometric}: write it as PNG"
    return ""
