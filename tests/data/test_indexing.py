"""Every layout indexes to the same run, and bad images are left out by name."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from index_tool import run_tool
from PIL import Image
from scipy.io import savemat

from megatron_nepa.benchmarks.index import measure
from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames, Stamp
from megatron_nepa.data.index.folder import read_sizes, scan_folder
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.index.labels import with_labels
from megatron_nepa.data.index.sources import list_source, open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.verify import Checked, Chunk, Verify, check_images
from megatron_nepa.data.indexing.write_shards import write_shards
from megatron_nepa.data.loaders.pretraining import PretrainingLoader, build_index
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share
from tests.runs import make_images


def first_images(index: DatasetIndex) -> torch.Tensor:
    """Two batches of the run over an index."""
    share = Share(16, 16, 1, 0, 1, 0, 1)
    feed = Feed(share, 3, torch.device("cpu"), torch.float32, consumed_samples=32)
    loader = PretrainingLoader(index, DataConfig(), 32, feed)
    images = torch.cat([batch.images for batch in islice(loader, 2)])
    loader.close()
    return images


def test_index_file_round_trip(photographs: Path, tmp_path: Path) -> None:
    """What is opened equals what was saved, stays on disk, and moves with its images."""
    shutil.copytree(photographs, tmp_path / "one" / "images")
    index = scan_folder(tmp_path / "one" / "images")
    save_index(index, tmp_path / "one" / "index")
    (tmp_path / "one").rename(tmp_path / "two")
    opened = load_index(tmp_path / "two" / "index")
    assert isinstance(opened.width, np.memmap)
    assert opened.fingerprint() == index.fingerprint()
    assert opened.classes == index.classes
    assert Path(opened.where(5)).is_file()
    assert "two" in opened.where(5)
    assert torch.equal(first_images(opened), first_images(scan_folder(photographs)))
    with pytest.raises(ConfigError, match="exists already"):
        save_index(index, tmp_path / "two" / "index")
    facts = tmp_path / "two" / "index" / "index.json"
    whole = facts.read_text()
    for text in ("[1]", '{"version": 1}'):
        facts.write_text(text)
        with pytest.raises(ConfigError, match="index is damaged"):
            load_index(facts.parent)
    facts.write_text(whole)
    (tmp_path / "two" / "index" / "width.npy").unlink()
    with pytest.raises(ConfigError, match=r"is damaged \(.*width.npy"):
        build_index(DataConfig(path=str(tmp_path / "two" / "index")))


def test_a_million_rows_open_at_once(tmp_path: Path) -> None:
    """1.28 million rows: open, hash, and the first batch of the order in under 3 s."""
    from megatron_nepa.data.sampling.order import image_of_sample

    count = 1_281_167
    sizes = np.full(count, 500, np.int32)
    names = PackedNames.pack(f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(count))
    save_index(DatasetIndex(tmp_path, names, sizes, sizes, sizes), tmp_path / "index")
    start = time.perf_counter()
    index = load_index(tmp_path / "index")
    index.fingerprint()
    images = image_of_sample(0, np.arange(256), count)
    assert index.names[int(images[0])].endswith(f"_{images[0]}.JPEG")
    assert time.perf_counter() - start < 3


def test_shards_and_folder_give_the_same_run(photographs: Path, tmp_path: Path) -> None:
    """The tool packs a tree into tar shards whose index gives the same images, boxes and labels."""
    result = run_tool(
        photographs, "--to_shards", tmp_path, "--shard_size", 10, "--out", tmp_path / "index", "--workers", 2
    )
    assert result.returncode == 0, result.stderr
    assert "37 images, 3 classes, 0 left out" in result.stdout
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [f"shard_{i:06d}.tar" for i in range(4)]
    folder, shards = scan_folder(photographs), load_index(tmp_path / "index")
    assert shards.fingerprint() == folder.fingerprint()
    assert shards.classes == ("ant", "bee", "cow")
    assert torch.equal(first_images(shards), first_images(folder))


@pytest.mark.parametrize(
    ("rows", "batches"),
    [(100_000_000, 60), pytest.param(1_000_000_000, 2_000, marks=pytest.mark.slow)],
)
def test_a_rank_that_draws_from_all_rows_does_not_grow(
    rows: int, batches: int, photographs: Path, tmp_path: Path
) -> None:
    """Sparse files: each batch touches 7 MB of pages, which are let go of; through the start of an epoch too."""
    write_shards(scan_folder(photographs), tmp_path / "shards", 20, progress=False)
    real = read_sizes(list_source(tmp_path / "shards"))
    timing = measure(rows, real, tmp_path, 256, batches)
    assert timing.peak_mb < timing.settled_mb + 30


def test_a_replaced_shard_is_noticed(photographs: Path, tmp_path: Path) -> None:
    """By its size, or by its first and last bytes where it is younger; a copy of it serves as well."""
    write_shards(scan_folder(photographs), tmp_path / "one/shards", 20, progress=False)
    build_and_save_index(open_source(tmp_path / "one/shards"), tmp_path / "one/index", workers=1, progress=False)
    expected = first_images(load_index(tmp_path / "one/index"))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)  # other times
    index = load_index(tmp_path / "two/index")
    assert torch.equal(first_images(index), expected)

    shard = tmp_path / "two/shards/shard_000001.tar"
    content = shard.read_bytes()
    kept = shard.stat()
    first, last = (bytearray(content) for _ in range(2))
    first[700] ^= 1
    last[-1] ^= 1
    for changed in (bytes(first), bytes(last), content + bytes(512), content[:-512], b""):
        shard.write_bytes(changed)
        with pytest.raises(ConfigError, match=rf"{shard} was replaced or changed since it was indexed: index the data"):
            first_images(index)
    shard.write_bytes(content)
    os.utime(shard, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert torch.equal(first_images(index), expected)


def test_opening_reads_no_rows(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint is the recorded one, also of indexes that record none; a selection has one of its own."""
    index = scan_folder(photographs)
    save_index(index, tmp_path / "index")
    expected = index.fingerprint()
    facts = json.loads((tmp_path / "index/index.json").read_text())
    older = {name: value for name, value in facts.items() if name not in ("fingerprint", "arrays")}
    older |= {"version": 1, "shards": [], "quarantine": [["a", "b"]]}
    (tmp_path / "index/index.json").write_text(json.dumps(older))
    opened = load_index(tmp_path / "index")
    assert opened.fingerprint() == expected
    assert list(opened.quarantine) == [("a", "b")]
    (tmp_path / "index/index.json").write_text(json.dumps(facts))
    opened = load_index(tmp_path / "index")
    assert opened.select(np.arange(3)).fingerprint() == index.select(np.arange(3)).fingerprint() != expected
    with monkeypatch.context() as patch:
        patch.setattr("megatron_nepa.data.index.dataset_index.hashlib.blake2b", None)
        assert opened.fingerprint() == expected
    np.save(tmp_path / "index/label.npy", index.label[:-1])
    with pytest.raises(ConfigError, match=r"label.npy has \d+ bytes where \d+ were written: index the data again"):
        load_index(tmp_path / "index")


def test_opening_takes_no_memory_for_shards_or_bad_images(tmp_path: Path) -> None:
    """The memory that opening takes, and asking for the classes, is that of an index of a few."""
    peaks = []
    for count in (10, 20_000):
        names = PackedNames.pack(f"{i:06d}.jpg" for i in range(count))
        zeros = np.zeros(count, np.int32)
        shards = tuple(f"{i:06d}.tar" for i in range(count))
        bad = tuple((f"bad_{i}.jpg", "damaged") for i in range(count))
        stamps = tuple(Stamp(i, i, "0" * 32) for i in range(count))
        index = DatasetIndex(
            tmp_path, names, zeros, zeros, zeros, shards=shards, shard=zeros, quarantine=bad, stamps=stamps
        )
        index = replace(index, offset=zeros.astype(np.int64), size=zeros.astype(np.int64))
        save_index(index, tmp_path / f"index_{count}")
        load_index(tmp_path / f"index_{count}")
        tracemalloc.start()
        opened = load_index(tmp_path / f"index_{count}")
        assert opened.num_classes == 1
        assert opened.stamps[count - 1] == stamps[-1]
        assert opened.quarantine[count - 1] == bad[-1]
        assert opened.where(count - 1).endswith("/000000.tar:" + names[count - 1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_labels_of_other_shards(photographs: Path, tmp_path: Path) -> None:
    """A number in key.cls, or under "label" in key.json; an image without one is counted."""
    beside = {
        "a.cls": "4\n",
        "b.json": '{"label": 7, "caption": "bees"}',
        "c.json": '{"caption": "a cow"}',
        "d.txt": "5",
    }
    image = next(photographs.glob("ant/*.jpg")).read_bytes()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, text in beside.items():
            for member, content in ((f"{name[0]}.jpg", image), (name, text.encode())):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    listing = list_source(tmp_path)
    assert listing.label.tolist() == [4, 7, -1, -1]
    assert "2 images without a label" in listing.notes


def test_a_vanished_shard_is_named(photographs: Path, tmp_path: Path) -> None:
    """A shard that is gone, or shorter than when it was indexed, is named with its path."""
    write_shards(scan_folder(photographs), tmp_path, 37, progress=False)
    index = build_and_save_index(open_source(tmp_path), tmp_path / "index", workers=1, progress=False)
    index = replace(index, stamps=())  # as an index of an older release
    shard = tmp_path / "shard_000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=rf"{shard}:.*the shard ends \d+ bytes before this image does"):
        first_images(index)
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"{shard}:.*no such file"):
        first_images(index)


def test_resized_shards(photographs: Path, tmp_path: Path) -> None:
    """Images are scaled down to the shorter side and never up; other shards in the folder are refused."""
    index = scan_folder(photographs)
    write_shards(index, tmp_path, 20, shorter_side=100, progress=False)
    small = build_and_save_index(open_source(tmp_path), tmp_path / "index", workers=1, progress=False)
    shorter = np.minimum(index.width, index.height)
    assert (np.minimum(small.width, small.height) == np.minimum(shorter, 100)).all()
    ratio = (small.width / small.height) / (index.width / index.height)
    assert (abs(ratio - 1) < 0.02).all()
    with pytest.raises(ConfigError, match="holds shards of other images or another size"):
        write_shards(index, tmp_path, 10, progress=False)
    with pytest.raises(ConfigError, match="the shorter side is -4"):
        write_shards(index, tmp_path / "none", 20, shorter_side=-4, progress=False)
    assert not (tmp_path / "none").exists()


def test_imagenet_archive_of_archives(photographs: Path, tmp_path: Path) -> None:
    """The training set as it is downloaded: one tar of a tar a class, read in place."""
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in ("ant", "bee", "cow"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for file in sorted((photographs / name).iterdir()):
                    archive.add(file, file.name)
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = len(inner.getvalue())
            inner.seek(0)
            outer.addfile(member, inner)
    index = build_and_save_index(open_source(tmp_path / "train.tar"), tmp_path / "index", workers=1, progress=False)
    folder = scan_folder(photographs)
    assert index.classes == folder.classes
    assert (index.label == folder.label).all()
    assert torch.equal(first_images(index), first_images(folder))


def test_validation_ground_truth(photographs: Path, tmp_path: Path) -> None:
    """Labels from a list, by number, by name, and through the development kit's own numbering."""
    flat = tmp_path / "val"
    shutil.copytree(photographs / "ant", flat)
    listing = list_source(flat)
    count = len(listing)
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("\n".join(str(i % 3 + 1) for i in range(count)))
    assert with_labels(listing, numbers).label.tolist() == [i % 3 + 1 for i in range(count)]
    kind = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    synsets = np.array([(1, "n03", 0), (2, "n01", 0), (3, "n02", 0), (4, "n00", 3)], dtype=kind)
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    labelled = with_labels(listing, numbers, tmp_path / "meta.mat")
    assert labelled.classes == ("n01", "n02", "n03")
    assert labelled.label.tolist() == [(2, 0, 1)[i % 3] for i in range(count)]
    named = tmp_path / "named.txt"
    named.write_text("\n".join(f"{listing.names[i]} {'ba'[i % 2]}" for i in reversed(range(count))))
    assert with_labels(listing, named).label.tolist() == [1 - i % 2 for i in range(count)]
    numbers.write_text("1\n2\n")
    with pytest.raises(ConfigError, match=f"holds 2 labels for the {count} images"):
        with_labels(listing, numbers)


def test_image_and_mask_pairs(tmp_path: Path) -> None:
    """Pairs by name; an image without a mask, or with one of another size, is left out by name."""
    for folder in ("images", "annotations"):
        (tmp_path / folder / "training").mkdir(parents=True)
    for name in "abcd":
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / "training" / f"{name}.jpg")
    for name, size in (("a", (40, 30)), ("b", (41, 30)), ("d", (40, 30))):
        Image.new("L", size).save(tmp_path / "annotations" / "training" / f"{name}.png")
    index = build_and_save_index(open_source(tmp_path), tmp_path / "index", workers=1, progress=False)
    assert [index.names[i] for i in range(len(index))] == ["images/training/a.jpg", "images/training/d.jpg"]
    assert [index.masks[i] for i in range(len(index))] == ["annotations/training/a.png", "annotations/training/d.png"]
    assert [name for name, _ in index.quarantine] == ["images/training/c.jpg", "images/training/b.jpg"]
    assert "is 40 x 30, its mask annotations/training/b.png 41 x 30" in index.quarantine[1][1]
    mask = tmp_path / index.masks[1]
    Image.effect_noise((40, 30), 50).save(mask)
    mask.write_bytes(mask.read_bytes()[:300])  # header kept, pixels cut short
    full = build_and_save_index(open_source(tmp_path), tmp_path / "full", "full", workers=1, progress=False)
    assert [full.names[i] for i in range(len(full))] == ["images/training/a.jpg"]
    assert (
        "its mask annotations/training/d.png: image file is truncated" in dict(full.quarantine)["images/training/d.jpg"]
    )
    with pytest.raises(ConfigError, match="no images/validation"):
        list_source(tmp_path, split="validation")


@pytest.mark.parametrize("cut", ["end mark", "image"])
def test_a_shard_cut_short_is_refused(photographs: Path, tmp_path: Path, cut: str) -> None:
    """Even if only the end mark is gone: nobody knows how many images were behind it."""
    index = scan_folder(photographs)
    write_shards(index, tmp_path, 20, progress=False)
    shard = tmp_path / "shard_000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.rstrip(b"\0") if cut == "end mark" else content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"shard_000001\.tar (is|ends) .*cut short"):
        list_source(tmp_path)


@pytest.mark.parametrize(
    ("verify", "device", "processes"), [("full", "cuda", 4), ("header", "cuda", 64), ("full", "cpu", 64)]
)
def test_a_gpu_gets_a_few_processes_not_one_a_core(
    verify: Verify, device: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def check(chunks: Iterator[Chunk], verify: Verify, device: str, workers: int) -> Iterator[tuple[Chunk, Checked]]:
        started.append(workers)
        yield from check_images(chunks, "header", "cpu", 1)

    monkeypatch.setattr("megatron_nepa.data.indexing.build.check_images", check)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    listing = open_source(make_images(tmp_path / "images"))
    build_and_save_index(listing, tmp_path / "index", verify, device, progress=False)
    assert started == [processes]
