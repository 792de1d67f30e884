"""What an image file's first bytes say: whether it is an image that can be used, and its size."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO

from PIL import Image

# what DALI decodes as PIL does, to one grey level; of BMP it does not decode every kind alike
FORMATS = {"JPEG", "MPO", "PNG", "WEBP"}
MODES = {"RGB", "L", "CMYK", "YCbCr", "RGBA", "LA", "P", "1"}
# names that are taken for images when a folder is listed; the ones that are not decoded are then quarantined by name
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 2**28  # of one image: DALI allocates 3 bytes for each
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is lower, and its error gives no width and height: see open_image

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class UnreadableImageError(Exception):
    """The reason why one image cannot be used, in a few words."""


class InaccessibleImageError(UnreadableImageError):
    """The reason why the bytes of an image could not be had: nothing is known about the image itself."""


def check_signature(data: bytes) -> None:
    """Raise :class:`UnreadableImageError` unless ``data`` begins like a JPEG, PNG or WebP file."""
    if not data:
        raise UnreadableImageError("empty file")
    if not (data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise UnreadableImageError(f"not a JPEG, PNG or WebP: it begins with {data[:4].hex(' ')}")


def extension_of(first: bytes) -> str:
    """The extension of an image's file by its first bytes; "" where they are none of a JPEG, PNG or WebP file."""
    if first.startswith(_SIGNATURES):
        return ".jpg" if first.startswith(_SIGNATURES[0]) else ".png"
    return ".webp" if first[:4] == b"RIFF" and first[8:12] == b"WEBP" else ""


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """``Image.open`` with :data:`MAX_PIXELS` as the limit; no pixel is decoded yet.

    Raises:
        UnreadableImageError: the image is larger; whatever else is wrong raises what Pillow raises.
    """
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UnreadableImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """Stored width and height (EXIF orientation not applied) from the header; no pixel is decoded.

    Args:
        data: the whole file, or its beginning where the header is known to end there.

    Raises:
        UnreadableImageError: the header is damaged, or of a kind that the decoder is not known to decode as PIL does.
    """
    check_signature(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not used
            with open_image(io.BytesIO(data)) as image:
                width, height, mode = image.width, image.height, image.mode
                kind, frames = image.format, getattr(image, "n_frames", 1)
                animated = frames > 1 or "disposal" in image.info  # PIL counts one frame where the count is damaged
    except UnreadableImageError:
        raise
    except Exception as error:  # PIL raises a dozen types on damaged headers, struct.error and SyntaxError among them
        raise UnreadableImageError(f"damaged header ({type(error).__name__})") from error
    if kind not in FORMATS:
        raise UnreadableImageError(f"{kind} files are not supported")
    if mode not in MODES:
        raise UnreadableImageError(f"pixels of mode {mode} are not supported")
    if animated and kind != "MPO":  # of an MPO both decoders take the first frame
        raise UnreadableImageError("an animation")
    return width, height
