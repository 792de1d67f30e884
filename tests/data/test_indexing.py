"""Every layout indexes to the same run, bad images are left out by name, and work resumes."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import crashing_worker
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data import indexing, verify
from megatron_nepa.data.claim import claimed
from megatron_nepa.data.folder import scan_folder
from megatron_nepa.data.index import DatasetIndex
from megatron_nepa.data.index_file import load_index, save_index
from megatron_nepa.data.indexing import build_and_save_index
from megatron_nepa.data.labels import with_labels
from megatron_nepa.data.loader import PretrainingLoader, build_index
from megatron_nepa.data.shards import write_shards
from megatron_nepa.data.share import Share
from megatron_nepa.data.sources import list_source

TOOL = Path(__file__).parents[2] / "tools" / "index_dataset.py"


def first_images(index: DatasetIndex) -> torch.Tensor:
    """Two batches of the run over an index."""
    share = Share(16, 16, 1, 0, 1, 0, 1)
    loader = PretrainingLoader(
        index, DataConfig(), 32, 3, share, torch.device("cpu"), torch.float32, consumed_samples=32
    )
    images = torch.cat([batch.images for batch in islice(loader, 2)])
    loader.close()
    return images


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """tools/index_dataset.py as a user runs it."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


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
    from megatron_nepa.data.index import PackedNames
    from megatron_nepa.data.order import image_of_sample

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


def test_labels_of_other_shards(photographs: Path, tmp_path: Path) -> None:
    """A number in key.cls, or under "label" in key.json; whatever else lies there is no label."""
    beside = {
        "a.cls": "4\n",
        "b.json": '{"label": 7, "caption": "bees"}',
        "c.json": '{"caption": "a cow"}',
        "d.cls": "dog",
        "e.txt": "5",
    }
    image = next(photographs.glob("ant/*.jpg")).read_bytes()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, text in beside.items():
            for member, content in ((f"{name[0]}.jpg", image), (name, text.encode())):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    listing = list_source(tmp_path)
    assert listing.label.tolist() == [4, 7, -1, -1, -1]
    assert not listing.quarantine


def test_a_vanished_shard_is_named(photographs: Path, tmp_path: Path) -> None:
    """A shard that is gone, or shorter than when it was indexed, is named with its path."""
    write_shards(scan_folder(photographs), tmp_path, 37, progress=False)
    index = build_and_save_index(list_source(tmp_path), tmp_path / "index", workers=1, progress=False)
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
    small = build_and_save_index(list_source(tmp_path), tmp_path / "index", workers=1, progress=False)
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
    index = build_and_save_index(list_source(tmp_path / "train.tar"), tmp_path / "index", workers=1, progress=False)
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
    index = build_and_save_index(list_source(tmp_path), tmp_path / "index", workers=1, progress=False)
    assert [index.names[i] for i in range(len(index))] == ["images/training/a.jpg", "images/training/d.jpg"]
    assert [index.masks[i] for i in range(len(index))] == ["annotations/training/a.png", "annotations/training/d.png"]
    assert [name for name, _ in index.quarantine] == ["images/training/c.jpg", "images/training/b.jpg"]
    assert "is 40 x 30, its mask annotations/training/b.png 41 x 30" in index.quarantine[1][1]
    mask = tmp_path / index.masks[1]
    Image.effect_noise((40, 30), 50).save(mask)
    mask.write_bytes(mask.read_bytes()[:300])  # header kept, pixels cut short
    full = build_and_save_index(list_source(tmp_path), tmp_path / "full", "full", workers=1, progress=False)
    assert [full.names[i] for i in range(len(full))] == ["images/training/a.jpg"]
    assert (
        "its mask annotations/training/d.png: image file is truncated" in dict(full.quarantine)["images/training/d.jpg"]
    )
    with pytest.raises(ConfigError, match="no images/validation"):
        list_source(tmp_path, split="validation")


@pytest.mark.parametrize("cut", ["end mark", "image"])
def test_a_shard_cut_short_is_named(photographs: Path, tmp_path: Path, cut: str) -> None:
    """Its whole images are kept and the shard is reported, even if only the end mark is gone."""
    index = scan_folder(photographs)
    write_shards(index, tmp_path, 20, progress=False)
    shard = tmp_path / "shard_000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.rstrip(b"\0") if cut == "end mark" else content[: len(content) // 2])
    listing = list_source(tmp_path)
    assert len(listing) == 37 if cut == "end mark" else 20 < len(listing) < 37
    assert [name for name, _ in listing.quarantine] == ["shard_000001.tar"]
    assert "cut short or damaged" in listing.quarantine[0][1]


def test_full_verification_decodes_every_pixel(photographs: Path, tmp_path: Path) -> None:
    """A file cut at half passes the header check and not the full one."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    victim = folder / "bee" / "01.jpg"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    listing = list_source(folder)
    header = build_and_save_index(listing, tmp_path / "header", "header", workers=1, progress=False)
    assert len(header) == 37
    result = run_tool(folder, "--out", tmp_path / "full", "--verify", "full", "--workers", 1)
    assert result.returncode == 0
    assert "left out bee/01.jpg: the decoder refuses it" in result.stdout
    assert len(load_index(tmp_path / "full")) == 36


def test_an_image_that_kills_the_decoder_costs_itself_alone(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that die are replaced, and the image that killed them is found."""
    listing = list_source(photographs)
    monkeypatch.setattr(verify, "_check", crashing_worker.check)
    rows = np.arange(len(listing))
    found = list(verify.check_images(listing, list(np.array_split(rows, 4)), "header", "cpu", 2))
    assert sorted(np.concatenate([checked.rows for checked in found]).tolist()) == rows.tolist()
    reasons = {row: reason for checked in found for row, reason in checked.reasons.items()}
    assert reasons == dict.fromkeys(crashing_worker.FATAL_ROWS, "crashes the decoder")
    assert sum(int(checked.width.sum()) for checked in found) == len(rows) - 3


def test_an_interrupted_index_continues(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished chunks are not checked again; another listing is refused."""
    monkeypatch.setattr("megatron_nepa.data.indexing._CHUNK", 10)
    listing = list_source(photographs)
    real = verify.check_images

    def stopped(*arguments: object) -> object:
        yield next(iter(real(*arguments)))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_nepa.data.indexing.check_images", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    assert not (tmp_path / "index").exists()
    with pytest.raises(ConfigError, match="begun with other images"):
        build_and_save_index(list_source(photographs / "ant"), tmp_path / "index", workers=1, progress=False)
    asked: list[int] = []

    def counted(images: DatasetIndex, chunks: list[np.ndarray], *rest: object) -> object:
        asked.extend(len(chunk) for chunk in chunks)
        return real(images, chunks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("megatron_nepa.data.indexing.check_images", counted)
    index = build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    assert sum(asked) == 27
    assert index.fingerprint() == scan_folder(photographs).fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_two_commands_do_not_write_the_same_index(photographs: Path, tmp_path: Path) -> None:
    listing = list_source(photographs)
    facts = indexing._identity(listing, "header")
    with (
        claimed(tmp_path / "index.partial/listing.json", facts, ""),
        pytest.raises(ConfigError, match=r"another process is writing .*index\.partial: wait for its end"),
    ):
        build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    (tmp_path / "index.partial/listing.json").write_text("")  # killed before it wrote what it had begun with
    build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_no_worker_outlives_a_killed_tool(photographs: Path, tmp_path: Path) -> None:
    """kill -9 of the parent ends its workers, those that were still starting too."""
    code = (
        "import numpy as np, sys, time\n"
        "from megatron_nepa.data.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    pool = worker_pool(2)\n"
        "    tasks = [pool.submit(time.sleep, 60) for _ in range(4)]\n"
        "    time.sleep(1)\n"
        "    print(*pool._processes, flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert workers
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(worker) for worker in workers)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_tool_refuses_before_it_works(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is indexed, or written elsewhere, for a command that cannot end well."""
    tool = runpy.run_path(str(TOOL))
    index = tmp_path / "index"
    save_index(scan_folder(photographs), index)
    out = ["--out", str(tmp_path / "new")]
    cases = {
        "out is empty": [photographs, "--out", ""],
        "to_shards is empty": [photographs, *out, "--to_shards", ""],
        "give --to_shards to pack its images": [index, *out],
        "explains the numbers of --labels": [photographs, *out, "--devkit_meta", "meta.mat"],
        "the shard size is 0": [photographs, *out, "--to_shards", tmp_path / "shards", "--shard_size", "0"],
    }
    for message, arguments in cases.items():
        monkeypatch.setattr("sys.argv", ["index_dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match=message):
            tool["main"]()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_the_tool_says_what_is_wrong(tmp_path: Path) -> None:
    """One sentence and a non-zero exit."""
    result = run_tool(tmp_path / "nowhere", "--out", tmp_path / "index")
    assert result.returncode == 1
    assert result.stderr.strip() == f"index_dataset: the data folder {tmp_path / 'nowhere'} does not exist."
