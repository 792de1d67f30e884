"""The loader gives the same samples and pixels however the run is cut, and survives bad images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch, crop_pipeline
from megatron_nepa.data.decoding.normalising import normalise
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.decoding.sample_reader import ReadAhead
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.pretraining import Batch, PretrainingLoader, SyntheticLoader
from megatron_nepa.data.sampling import order
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import crop_boxes, flips, image_of_sample
from megatron_nepa.data.sampling.rank_share import Share
from tests.data.grids import GLOBAL, GRIDS, SEED, SIZE, Grid, seen_on
from tests.runs import make_images

CPU = torch.device("cpu")


def make_loader(folder: Path, **changes: Any) -> PretrainingLoader:
    """A loader of global batch 8 on one rank, with any argument, data field or size of the share changed."""
    fields = {name: changes.pop(name) for name in list(changes) if name in DataConfig.__dataclass_fields__}
    sizes = {name: changes.pop(name) for name in list(changes) if name in Share.__dataclass_fields__}
    delivery = {name: changes.pop(name) for name in list(changes) if name in Feed.__dataclass_fields__}
    share = replace(Share(GLOBAL, GLOBAL, 1, 0, 1, 0, 1), **sizes)
    arguments: dict[str, Any] = {
        "index": changes.get("index") or scan_folder(folder),
        "config": DataConfig(**({"horizontal_flip": True} | fields)),
        "image_size": SIZE,
        "feed": replace(Feed(share, SEED, CPU, torch.float32), **delivery),
    }
    return PretrainingLoader(**(arguments | changes))


def take(loader: PretrainingLoader, count: int) -> list[Batch]:
    """The next ``count`` micro-batches, then the loader is closed."""
    batches = list(islice(loader, count))
    loader.close()
    return batches


@pytest.fixture(scope="module")
def reference(photographs: Path) -> Tensor:
    """The first 12 steps on one rank: 96 samples, more than two epochs of 37."""
    return torch.cat([batch.images for batch in take(make_loader(photographs), 12)])


@pytest.mark.parametrize("grid", [*GRIDS, Grid(micro=1), Grid(2, 4, 2)], ids=str)
def test_grids_see_the_same_run(photographs: Path, reference: Tensor, grid: Grid) -> None:
    """Replicas, tensor-parallel ranks and accumulation cut the run's samples; none changes a pixel."""
    pixels, _ = seen_on(grid, scan_folder(photographs), 5)
    assert torch.equal(pixels, reference[: 5 * GLOBAL])


@pytest.mark.parametrize("step", [1, 4, 11])
def test_restart_continues_the_run(photographs: Path, reference: Tensor, step: int) -> None:
    """A loader started at any step continues as if it had never stopped, on another grid too."""
    consumed = step * GLOBAL
    loader = make_loader(photographs, consumed_samples=consumed, micro_batch_size=2, accumulation_steps=4)
    assert loader.consumed_samples == consumed
    batches = take(loader, 4)
    assert loader.consumed_samples == consumed + GLOBAL
    assert torch.equal(torch.cat([batch.images for batch in batches]), reference[consumed : consumed + GLOBAL])
    assert torch.cat([batch.sample_index for batch in batches]).tolist() == list(range(consumed, consumed + GLOBAL))


def test_the_order_of_many_images_is_cut_alike(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order is computed, replicas and restarts see the same run; version 1 goes on with the shuffle."""
    shuffled = torch.cat([batch.images for batch in take(make_loader(photographs), 6)])
    monkeypatch.setattr(order, "LARGEST_SHUFFLE", 8)
    computed = torch.cat([batch.images for batch in take(make_loader(photographs), 6)])
    assert not torch.equal(computed, shuffled)
    assert torch.equal(torch.cat([batch.images for batch in take(make_loader(photographs, order=1), 6)]), shuffled)
    for rank in range(2):
        loader = make_loader(photographs, micro_batch_size=4, data_rank=rank, data_size=2, consumed_samples=2 * GLOBAL)
        for batch in take(loader, 4):
            assert torch.equal(batch.images, computed[batch.sample_index])


def test_threads_change_nothing(photographs: Path, reference: Tensor) -> None:
    """1 and 4 decoding threads give the same pixels."""
    for threads in (1, 4):
        images = torch.cat([batch.images for batch in take(make_loader(photographs, num_threads=threads), 5)])
        assert torch.equal(images, reference[: 5 * GLOBAL])


def test_pixels_match_pil_and_torchvision(photographs: Path, reference: Tensor) -> None:
    """The same box resized by PIL: on average within 0.05 grey levels, nowhere more than 1; mirrored where due."""
    index = scan_folder(photographs)
    samples = np.arange(len(reference))
    images = image_of_sample(SEED, samples, len(index))
    boxes = crop_boxes(SEED, samples, index.width[images], index.height[images], 0.08)
    mirrored = flips(SEED, samples)
    differences = []
    for k, (x, y, w, h) in enumerate(boxes.tolist()):
        picture = Image.open(index.where(int(images[k]))).convert("RGB")
        crop = functional.resized_crop(picture, y, x, h, w, [SIZE, SIZE], functional.InterpolationMode.BILINEAR)
        expected = np.asarray(functional.hflip(crop) if mirrored[k] else crop, np.float32).transpose(2, 0, 1)
        differences.append(np.abs((reference[k].numpy() + 1) * 127.5 - expected))
    assert np.mean(differences) <= 0.05
    assert np.max(differences) <= 1.001
    assert 20 < mirrored.sum() < 76


def decode(batch: EncodedBatch, side: int) -> Tensor:
    """The crops of one batch, uint8 [n, 3, S, S]."""
    pipeline = crop_pipeline(lambda number: batch, len(batch.encoded), side, DecoderOptions(CPU, 2, 0.0, 0, 0))
    images = pipeline.next_images()
    pipeline.close()
    return images


def test_region_decode_is_full_decode_and_crop(photographs: Path) -> None:
    """The pixels of a region are those of the whole image, whatever surrounds it, and so is what it is resized to."""
    rng = np.random.default_rng(2)
    names = sorted(photographs.glob("*/*.jpg"))
    pictures = [np.asarray(Image.open(name).convert("RGB")) for name in names]
    side = 24
    for free in (False, True):  # boxes of the output's size, which no resize touches; boxes of any size
        shape = [[side, side] if not free else rng.integers(1, np.array(p.shape[1::-1]) + 1) for p in pictures]
        start = [rng.integers(0, np.array(p.shape[1::-1]) - s + 1) for p, s in zip(pictures, shape, strict=True)]
        encoded = [np.fromfile(name, np.uint8) for name in names]
        batch = EncodedBatch(encoded, np.array(start, np.int32), np.array(shape, np.int32))
        images = decode(batch, side)
        for image, picture, (x, y), (w, h) in zip(images, pictures, start, shape, strict=True):
            crop = torch.from_numpy(picture[y : y + h, x : x + w].copy()).permute(2, 0, 1)
            expected = torch.nn.functional.interpolate(crop[None], (side, side), mode="bilinear", antialias=True)
            assert torch.equal(image, expected[0])
            assert free or torch.equal(image, crop)


@pytest.mark.parametrize(("load", "deterministic"), [(0.65, 1.0), (0.3, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_a_deterministic_run_splits_no_batch_between_decoders(
    load: float, deterministic: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = scan_folder(make_images(tmp_path / "images"))
    config = DataConfig(hw_decoder_load=load)
    assert DecoderOptions.of(config, index, torch.device("cpu")).hw_decoder_load == load
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert DecoderOptions.of(config, index, torch.device("cpu")).hw_decoder_load == deterministic


def test_normalise() -> None:
    """(x / 255 - 0.5) / 0.5, rounded once, in memory of its own; mirroring is per image."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16).repeat(2, 1, 1, 1)
    exact = (levels.double() / 255 - 0.5) / 0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = normalise(levels, None, dtype)
        assert result.dtype == dtype
        # half an ulp of each value, and a hair for the exact value's own rounding
        ulp = torch.finfo(dtype).eps * exact.abs()
        assert ((result.double() - exact).abs() <= ulp * 0.5 * 1.001).all()
    both = normalise(levels, torch.tensor([True, False]), torch.float32)
    plain = normalise(levels, None, torch.float32)
    assert torch.equal(both[0], plain[0].flip(2))
    assert torch.equal(both[1], plain[1])


def test_flip_is_off_by_default(photographs: Path, reference: Tensor) -> None:
    """Without horizontal_flip the same crops come unmirrored."""
    images = torch.cat([batch.images for batch in take(make_loader(photographs, horizontal_flip=False), 3)])
    mirrored = torch.from_numpy(flips(SEED, np.arange(3 * GLOBAL)))
    assert torch.equal(images, torch.where(mirrored[:, None, None, None], reference.flip(3)[:24], reference[:24]))


def damage(folder: Path, kind: str) -> list[str]:
    """Damage two images of a folder that is already indexed; returns their names."""
    names = ["ant/03.jpg", "cow/05.jpg"]
    for name in names:
        path = folder / name
        if kind == "missing":
            path.unlink()
        elif kind == "garbage":
            path.write_bytes(b"hello world" * 100)
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "cut_header":
            path.write_bytes(path.read_bytes()[:300])
        else:  # header kept, no pixel left
            content = path.read_bytes()
            path.write_bytes(content[: content.index(b"\xff\xda") + 20])
    return names


@pytest.mark.parametrize("kind", ["missing", "garbage", "empty", "cut_header", "truncated"])
def test_bad_images_are_replaced(photographs: Path, tmp_path: Path, kind: str) -> None:
    """Images that go bad during a run give way to the next of the permutation, the same on every grid."""
    folder, log = tmp_path / "data", tmp_path / "bad_images.jsonl"
    shutil.copytree(photographs, folder)
    index = scan_folder(folder)
    names = damage(folder, kind)
    bad = [i for i in range(len(index)) if index.names[i] in names]
    loader = make_loader(folder, index=index, bad_image_log=log, num_threads=1)
    whole = torch.cat([batch.images for batch in islice(loader, 5)])  # 40 samples: one epoch of 37 and a little
    assert loader.num_bad_images >= 2
    loader.close()

    good = take(make_loader(photographs), 5)
    samples = np.arange(5 * GLOBAL)
    replaced = np.isin(image_of_sample(SEED, samples, len(index)), bad)
    assert 2 <= replaced.sum() <= 4
    assert torch.equal(whole[~replaced], torch.cat([batch.images for batch in good])[~replaced])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["sample"] for row in rows if row["sample"] < 5 * GLOBAL} == set(samples[replaced].tolist())
    assert all(any(name in row["reason"] for name in names) for row in rows)

    parts = torch.full_like(whole, torch.nan)
    for rank in range(2):
        for batch in take(
            make_loader(folder, index=index, micro_batch_size=2, accumulation_steps=2, data_rank=rank, data_size=2), 10
        ):
            parts[batch.sample_index] = batch.images
    assert torch.equal(parts, whole)
    resumed = take(make_loader(folder, index=index, consumed_samples=3 * GLOBAL), 2)
    assert torch.equal(torch.cat([batch.images for batch in resumed]), whole[3 * GLOBAL :])


def test_a_rejected_batch_alone_is_read_again() -> None:
    read: list[int] = []
    ahead = ReadAhead(lambda batch: np.array([batch]), lambda part: read.extend(part.tolist()), threads=1, depth=3)
    ahead(0)
    ahead.forget(0)
    ahead(0)
    assert read == [0, 1, 2, 3, 0]
    ahead.close()


@pytest.mark.parametrize("kind", ["missing", "garbage", "truncated"])
def test_bad_images_end_the_run_where_asked(photographs: Path, tmp_path: Path, kind: str) -> None:
    """on_bad_image fail: one sentence that names the file."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    index = scan_folder(folder)
    names = damage(folder, kind)
    loader = make_loader(folder, index=index, on_bad_image="fail")
    with pytest.raises(ConfigError) as error:
        list(islice(loader, 5))
    assert "\n" not in str(error.value)
    assert any(str(folder / name) in str(error.value) for name in names)
    loader.close()


def test_too_many_bad_images_end_the_run(photographs: Path, tmp_path: Path) -> None:
    """skip is no licence to train on nothing: a vanished folder ends the run."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    index = scan_folder(folder)
    shutil.rmtree(folder)
    loader = make_loader(folder, index=index)
    with pytest.raises(ConfigError, match=r"more than data.max_bad_share 0.01"):
        next(loader)
    loader.close()
    loader = make_loader(folder, index=index, max_bad_share=1.0, num_threads=1)
    with pytest.raises(ConfigError, match=r"more than data.max_bad_share 1.0|none of the 37 images"):
        next(loader)
    loader.close()


def test_sizes_that_do_not_fit_are_refused(photographs: Path) -> None:
    """A batch that is not the product of its parts, or a restart inside a step."""
    with pytest.raises(ConfigError, match="global_batch_size 8 is not micro_batch_size 3"):
        make_loader(photographs, micro_batch_size=3)
    with pytest.raises(ConfigError, match="12 samples"):
        make_loader(photographs, consumed_samples=12)


def test_synthetic_loader() -> None:
    """Same interface: sample numbers of the run, one set of images, sharded over tensor-parallel ranks."""
    whole = SyntheticLoader(SIZE, Feed(Share(4, 16, 2, 1, 2, 0, 1), 0, CPU, torch.bfloat16, consumed_samples=16))
    first, second = islice(whole, 2)
    assert first.sample_index.tolist() == [20, 21, 22, 23]
    assert second.sample_index.tolist() == [28, 29, 30, 31]
    assert first.images.shape == (4, 3, SIZE, SIZE)
    assert first.images.dtype == torch.bfloat16
    assert first.images.min() >= -1
    assert first.images.max() <= 1
    assert first.images.float().std() > 0.5
    assert whole.consumed_samples == 32
    part = next(SyntheticLoader(SIZE, Feed(Share(4, 16, 2, 1, 2, 1, 2), 0, CPU, torch.bfloat16)))
    assert torch.equal(part.images, first.images[2:])
