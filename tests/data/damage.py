"""Good files of every format that is read, and ways to damage them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 72, 56


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a saved image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray, interlaced: bool = False, size: tuple[int, int] | None = None) -> bytes:
    """A PNG as Pillow writes none: interlaced, of 16 bits, of many IDAT chunks, or with a size that is not its own.

    Args:
        pixels: uint8 or uint16 [H, W, 3].
        interlaced: in the seven passes of Adam7.
        size: width and height that its header states.
    """
    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in passes] if interlaced else [pixels]
    rows = [row for part in parts if part.size for row in part]
    raw = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 8 * pixels.itemsize, 2, 0, 0, int(interlaced))
    data = zlib.compress(raw)
    pieces = b"".join(chunk(b"IDAT", data[i : i + 1024]) for i in range(0, len(data), 1024))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pieces + chunk(b"IEND", b"")


def formats(number: int) -> dict[str, bytes]:
    """File name -> content: one picture in every format that is read."""
    coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pixels, alpha = np.asarray(picture), picture.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain.jpg": encoded(picture, "JPEG"),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "grey.jpg": encoded(alpha, "JPEG"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "restart.jpg": encoded(picture, "JPEG", restart_marker_rows=1),
        "rotated.jpg": encoded(picture, "JPEG", exif=exif),
        "two_pictures.jpg": encoded(picture, "MPO", save_all=True, append_images=[picture.rotate(180)]),
        "plain.png": encoded(picture, "PNG"),
        "grey.png": encoded(alpha, "PNG"),
        "alpha.png": encoded(Image.merge("RGBA", (*picture.split(), alpha)), "PNG"),
        "palette.png": encoded(picture.quantize(60), "PNG"),
        "one_bit.png": encoded(picture.convert("1"), "PNG"),
        "interlaced.png": png(pixels, interlaced=True),
        "many_chunks.png": png(np.random.default_rng(number).integers(0, 256, pixels.shape, dtype=np.uint8)),
        "sixteen_bit.png": png(pixels.astype(np.uint16) * 257),
        "plain.webp": encoded(picture, "WEBP"),
        "lossless.webp": encoded(picture, "WEBP", lossless=True),
        "alpha.webp": encoded(Image.merge("RGBA", (*picture.split(), alpha)), "WEBP"),
        "png_named.jpg": encoded(picture, "PNG"),
    }


def cut(content: bytes, draw: random.Random) -> bytes:
    """The first tenths of a file, none to nine."""
    return content[: len(content) * draw.randrange(10) // 10]


def _flip_bits(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(draw.randrange(1, 20)):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _flip_header_bits(content: bytes, draw: random.Random) -> bytes:
    return _flip_bits(content[:200], draw) + content[200:]


def _zero_end(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + bytes(len(content) - start)


def _zero_part(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randrange(1, 300))
    return content[:start] + bytes(end - start) + content[end:]


def _remove_part(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randrange(1, 300) :]


def _other_file(_: bytes, draw: random.Random) -> bytes:
    """Another format than the name says or the index knows, another size, an animation, or no image at all."""
    grey = Image.new("L", (WIDTH, HEIGHT), 90)
    second = Image.new("L", (WIDTH, HEIGHT), 180)
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    return draw.choice(
        [
            encoded(grey, "JPEG"),
            encoded(grey, "GIF"),
            encoded(grey, "BMP"),
            encoded(grey, "TIFF"),
            encoded(grey, "PNG", save_all=True, append_images=[second]),
            encoded(grey, "WEBP", save_all=True, append_images=[second]),
            encoded(Image.new("I;16", (WIDTH, HEIGHT), 900), "PNG"),
            encoded(grey.resize((20, 9)), "JPEG"),
            encoded(grey.resize((200, 300)), "PNG"),
            png(pixels, size=(60_000, 60_000)),
            png(pixels, size=(WIDTH, 2**31 - 1), interlaced=True),
            b"<html>404</html>" * 50,
            b"",
        ]
    )


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    *(cut, _flip_bits, _flip_header_bits, _zero_end, _zero_part, _remove_part, _other_file),
]
