"""A bad image never ends the process: whatever happens to a file, it is replaced and recorded, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import HEIGHT, WIDTH, formats, png
from PIL import Image

from megatron_nepa.analysis.images import load_image
from megatron_nepa.config import ConfigError, DataConfig, MaskConfig, ModelConfig
from megatron_nepa.data.decoding import crop_pipeline as module
from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch, undecodable_slots
from megatron_nepa.data.decoding.encoded_images import EncodedImages
from megatron_nepa.data.decoding.masks import load_mask
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.decoding.sample_reader import SampleReader
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.headers import MAX_PIXELS, UnreadableImageError, image_size
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from megatron_nepa.data.loaders.pretraining import PretrainingLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import SetOrder
from megatron_nepa.data.sampling.rank_share import Share

ROOT = Path(__file__).parents[2]
OPTIONS = DecoderOptions(torch.device("cpu"), 2, 0.0, WIDTH, HEIGHT)


def meet_damage(folder: Path, first: int, count: int, seconds: int) -> None:
    """Run meet_damage.py in a process of its own: a crash fails this test and no other, and so does a hang."""
    script = Path(__file__).with_name("meet_damage.py")
    command = [sys.executable, "-X", "faulthandler", str(script), str(folder), str(first), str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # native decoders print bytes of the files that they refuse
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_damaged_files(tmp_path: Path) -> None:
    """Some damaged files in every loader."""
    meet_damage(tmp_path, 0, 3, seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_many_damaged_files(tmp_path: Path, block: int) -> None:
    """A thousand runs of loaders over the four."""
    meet_damage(tmp_path, 1000 + 50 * block, 50, seconds=1800)


def one_image(folder: Path, content: bytes, size: tuple[int, int] = (WIDTH, HEIGHT)) -> EncodedImages:
    """The only image of an index that took its size for ``size``."""
    (folder / "image").write_bytes(content)
    width, height = (np.array([side], np.int32) for side in size)
    return EncodedImages(DatasetIndex(folder, PackedNames.pack(["image"]), width, height, np.zeros(1, np.int32)))


@pytest.mark.parametrize("name", formats(0))
def test_every_format_is_handed_to_the_decoder(tmp_path: Path, name: str) -> None:
    """Whole files pass byte for byte; PNGs that are cut anywhere, and files of another size, do not."""
    content = formats(0)[name]
    assert one_image(tmp_path, content).read(0).tobytes() == content
    with pytest.raises(UnreadableImageError, match=f"has {WIDTH} x {HEIGHT} pixels, and 9 x 7 when indexed"):
        one_image(tmp_path, content, (9, 7)).read(0)
    for tenth in range(10 if "png" in name else 1):
        with pytest.raises(UnreadableImageError, match=r"damaged or cut short|empty file"):
            one_image(tmp_path, content[: len(content) * tenth // 10]).read(0)


def test_pixels_of_no_type_are_refused(tmp_path: Path) -> None:
    """A JPEG whose frame header states 200 bits a sample parses, and still ends DALI's process."""
    content = bytearray(formats(0)["plain.jpg"])
    content[content.index(b"\xff\xc0") + 4] = 200
    with pytest.raises(UnreadableImageError, match="cannot parse it"):
        one_image(tmp_path, bytes(content)).read(0)


def test_chunks_that_end_nowhere_are_refused(tmp_path: Path) -> None:
    """A PNG with a chunk of 3 GB parses, and its decoder allocates them, however short the file."""
    content = bytearray(formats(0)["plain.png"])
    content[content.index(b"IDAT") - 4] = 0xBB
    with pytest.raises(UnreadableImageError, match="do not lead to its end"):
        one_image(tmp_path, bytes(content)).read(0)


@pytest.mark.parametrize("shorter_side", [None, 20])
def test_shards_of_a_bad_image_are_refused_by_name(tmp_path: Path, shorter_side: int | None) -> None:
    """One that vanished since it was indexed, and one that cannot be scaled."""
    (tmp_path / "cut.png").write_bytes(formats(0)["plain.png"][:-1000])
    index = scan_folder(tmp_path)
    if shorter_side is None:
        (tmp_path / "cut.png").unlink()
    with pytest.raises(ConfigError, match=r"cut.png cannot be packed .*--verify full"):
        write_shards(index, tmp_path / "shards", 10, shorter_side, workers=1, progress=False)


def test_bad_slots_are_found_by_halving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the decoder names no slot, a few pipelines find the ones that do not decode."""
    good = np.frombuffer(formats(0)["plain.jpg"], np.uint8)
    encoded_images = [good] * 64
    for slot in (5, 40):
        encoded_images[slot] = good[: len(good) - len(good) // 3]
    whole = np.tile(np.array([[WIDTH, HEIGHT]], np.int32), (64, 1))
    built, build = [], module._region_pipeline
    monkeypatch.setattr(module, "_region_pipeline", lambda *args: built.append(0) or build(*args))
    assert undecodable_slots(EncodedBatch(encoded_images, np.zeros((64, 2), np.int32), whole), OPTIONS) == [5, 40]
    assert len(built) <= 2 * 2 * 6 + 1


def test_a_bad_image_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    """One bad image of a small set is replaced in every epoch of a long run; more than ten end it."""

    def run(bad: set[int], epochs: int) -> SampleReader[int]:
        def read(sample: int, image: int) -> int:
            if image in bad:
                raise UnreadableImageError("damaged")
            return image

        sides = np.ones(20, np.int32)
        index = DatasetIndex(Path(), PackedNames.pack(map(str, range(20))), sides, sides, sides)
        order = SetOrder(0, len(index))
        reader = SampleReader(index, DataConfig(), 2, order, lambda batch: np.arange(20) + 20 * batch, read)
        for epoch in range(epochs):
            reader(epoch)
        reader.close()
        return reader

    assert run({3}, 40).num_bad_images >= 40
    assert run(set(range(10)), 3).num_bad_images >= 30
    with pytest.raises(ConfigError, match=r"11 of the first .* images of this rank cannot be used"):
        run(set(range(11)), 3)


def header(width: int, height: int) -> bytes:
    """A PNG that states any size and holds next to no pixel."""
    return png(np.zeros((1, 1, 3), np.uint8), size=(width, height))


def test_large_images(tmp_path: Path) -> None:
    """Up to 2^28 pixels, above Pillow's own limit, are read; beyond, they are refused by their size everywhere."""
    side = 2**14
    assert side * side == MAX_PIXELS
    assert image_size(header(side, side)) == (side, side)
    beyond = header(side, side + 1)
    (tmp_path / "large.png").write_bytes(beyond)
    reason = f"{side} x {side + 1} pixels, more than {MAX_PIXELS}"
    with pytest.raises(UnreadableImageError, match=reason):
        image_size(beyond)
    with pytest.raises(ConfigError, match=reason):
        load_image(tmp_path / "large.png", ModelConfig())
    names, sides = PackedNames.pack(["large.png"]), np.array([side], np.int32)
    with pytest.raises(UnreadableImageError, match=reason):
        load_mask(DatasetIndex(tmp_path, names, sides, sides + 1, sides, masks=names), 0, MaskConfig(num_classes=3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_largest_images_train(tmp_path: Path, kind: str) -> None:
    """An image of 2^28 pixels, verified and cropped."""
    folder = tmp_path / "large"
    folder.mkdir()
    Image.new("L", (2**14, 2**14), 90).save(folder / f"image.{kind.lower()}")
    index = build_and_save_index(open_source(folder), tmp_path / "index", "full", workers=1, progress=False)
    assert len(index) == 1
    loader = PretrainingLoader(
        index, DataConfig(), 32, Feed(Share(2, 2, 1, 0, 1, 0, 1), 0, OPTIONS.device, torch.float32)
    )
    images = next(iter(loader)).images
    loader.close()
    assert torch.equal(images, torch.full_like(images, 90 / 127.5 - 1))
