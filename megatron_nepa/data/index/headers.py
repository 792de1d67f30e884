"""What an image file's first bytes say: enough to keep bytes that are no image away from the decoder.

DALI ends the whole process with a segmentation fault when its decoder is handed bytes of no known format, so every byte
string passes :func:`check_signature` first.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image

# what DALI decodes as PIL does, to one grey level; of BMP it does not decode every kind alike
FORMATS = {"JPEG", "MPO", "PNG", "WEBP"}
MODES = {"RGB", "L", "CMYK", "YCbCr", "RGBA", "LA", "P", "1"}
# names that are taken for images when a folder is listed; the ones that are not decoded are then quarantined by name
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 2**28  # of one image: DALI allocates 3 bytes for each

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class UnreadableImageError(Exception):
    """The reason why one image cannot be used, in a few words."""


def check_signature(data: bytes) -> None:
    """Raise :class:`UnreadableImageError` unless ``data`` begins like a JPEG, PNG or WebP file."""
    if not data:
        raise UnreadableImageError("empty file")
    if not (data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise UnreadableImageError(f"not a JPEG, PNG or WebP: it begins with {data[:4].hex(' ')}")


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
            warnings.simplefilter("ignore")  # PIL's decompression bomb warning: MAX_PIXELS is our own limit
            with Image.open(io.BytesIO(data)) as image:
                width, height, mode = image.width, image.height, image.mode
                kind, frames = image.format, getattr(image, "n_frames", 1)
                animated = frames > 1 or "disposal" in image.info  # PIL counts one frame where the count is damaged
    except Exception as error:  # PIL raises a dozen types on damaged headers, struct.error and SyntaxError among them
        raise UnreadableImageError(f"damaged header ({type(error).__name__})") from error
    if kind not in FORMATS:
        raise UnreadableImageError(f"{kind} files are not supported")
    if mode not in MODES:
        raise UnreadableImageError(f"pixels of mode {mode} are not supported")
    if animated and kind != "MPO":  # of an MPO both decoders take the first frame
        raise UnreadableImageError("an animation")
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
    return width, height
