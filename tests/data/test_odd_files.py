"""Every odd file is decoded as PIL does, to one grey level, or left out by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from damage import encoded
from PIL import Image

from megatron_nepa.config import DataConfig
from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch, crop_pipeline
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.indexing.build import build_and_save_index

SIDE = 64


@pytest.fixture(scope="module")
def odd(cache: Path) -> dict[str, bytes]:
    """Name -> content of every odd kind."""
    photograph = Image.open(cache / "coffee" / "0000.jpg").convert("RGB").resize((SIDE, SIDE))
    second = photograph.rotate(90)
    good = encoded(photograph, "JPEG", quality=90)
    files = {
        "grey.jpg": encoded(photograph.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(photograph.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(photograph, "JPEG", progressive=True),
        "subsampled_444.jpg": encoded(photograph, "JPEG", subsampling=0),
        "subsampled_422.jpg": encoded(photograph, "JPEG", subsampling=1),
        "multi_picture.jpg": encoded(photograph, "MPO", save_all=True, append_images=[second]),
        "png_named.jpg": encoded(photograph, "PNG"),
        "webp_named.jpg": encoded(photograph, "WEBP"),
        "grey.png": encoded(photograph.convert("L"), "PNG"),
        "alpha.png": encoded(Image.merge("RGBA", (*photograph.split(), photograph.convert("L"))), "PNG"),
        "grey_alpha.png": encoded(photograph.convert("LA"), "PNG"),
        "palette.png": encoded(photograph.quantize(200), "PNG"),
        "one_bit.png": encoded(photograph.convert("1"), "PNG"),
        "trailing_junk.jpg": good + b"junk" * 50,
        "sixteen_bit.png": encoded(Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)), "PNG"),
        "animated.png": encoded(photograph, "PNG", save_all=True, append_images=[second]),
        "animated.webp": encoded(photograph, "WEBP", save_all=True, append_images=[second]),
        "bitmap.bmp": encoded(photograph, "BMP"),
        "gif.jpg": encoded(photograph, "GIF"),
        "tiff.tif": encoded(photograph, "TIFF"),
        "empty.jpg": b"",
        "text.jpg": b"hello world" * 100,
        "start_only.jpg": good[:3],
        "start_and_garbage.jpg": b"\xff\xd8\xff\xe0" + b"abc" * 1000,
        "header_only.jpg": good[:400],
        "cut_at_half.jpg": good[: len(good) // 2],
        "cut_at_half.png": encoded(photograph, "PNG")[:4000],
        "signature_only.png": b"\x89PNG\r\n\x1a\n" + b"x" * 500,
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"exif_{orientation}.jpg"] = encoded(photograph, "JPEG", exif=exif)
    return files


def test_odd_files(odd: dict[str, bytes], tmp_path: Path) -> None:
    """What full verification keeps equals PIL; everything else is quarantined, and nothing ends the process."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, content in odd.items():
        (folder / name).write_bytes(content)
    index = build_and_save_index(open_source(folder), tmp_path / "index", "full", workers=1, progress=False)
    kept = [index.names[i] for i in range(len(index))]
    left_out = {name for name, _ in index.quarantine}
    assert left_out | set(kept) == set(odd)
    assert left_out == {
        *("sixteen_bit.png", "animated.png", "animated.webp", "bitmap.bmp", "gif.jpg", "tiff.tif", "empty.jpg"),
        *("text.jpg", "start_only.jpg", "start_and_garbage.jpg", "header_only.jpg", "cut_at_half.jpg"),
        *("cut_at_half.png", "signature_only.png"),
    }
    store = ImageStore(index)
    count = len(index)
    whole = np.tile(np.array([[SIDE, SIDE]], np.int32), (count, 1))
    batch = EncodedBatch([store.read(i) for i in range(count)], np.zeros((count, 2), np.int32), whole)
    device = torch.device("cpu")
    pipeline = crop_pipeline(lambda number: batch, count, SIDE, DecoderOptions.of(DataConfig(), index, device))
    images = pipeline.next_images().numpy()
    pipeline.close()
    for i, name in enumerate(kept):
        with Image.open(folder / name) as image:
            expected = np.asarray(image.convert("RGB"), np.int16).transpose(2, 0, 1)
        assert np.abs(images[i] - expected).max() <= 1, name
