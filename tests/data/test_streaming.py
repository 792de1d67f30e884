"""An index that is made unit by unit, in parallel or in spite of being killed, is the one that is made at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import killed_indexing
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from megatron_nepa.data.index.folder import read_sizes, scan_folder
from megatron_nepa.data.index.headers import UnreadableImageError, image_size
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.index.sources import list_source, open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from tests.data.test_folders_and_archives import write_tar


def content(index: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in index.iterdir()}


def shards(photographs: Path, folder: Path) -> Path:
    """Five tar shards of class names, two of whose members are no images, and which hold more besides."""
    folder.mkdir()
    files = sorted(photographs.glob("*/*.jpg"))
    for number in range(5):
        members = []
        for i, file in enumerate(files[number::5]):
            data = file.read_bytes()
            members.append((f"{i:03d}.jpg", b"no image" if (number, i) in ((1, 2), (4, 0)) else data))
            members.append((f"{i:03d}.cls", file.parent.name.encode()))
        members.append((f"notes_{number}.txt", b"passed over"))
        write_tar(folder / f"{number}.tar", members)
    return folder


def test_shards_are_indexed_as_they_are_read_plainly(photographs: Path, tmp_path: Path) -> None:
    """Names, places, sizes, labels and what is left out, row by row as tarfile tells them."""
    folder = shards(photographs, tmp_path / "shards")
    index = build_and_save_index(open_source(folder), tmp_path / "index", workers=2, progress=False)
    expected, left_out = [], []
    for number in range(5):
        with tarfile.open(folder / f"{number}.tar") as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                    label = archive.extractfile(member.name.replace("jpg", "cls")).read()  # type: ignore[union-attr]
                    try:
                        place = (number, member.offset_data, member.size)
                        name = ("ant", "bee", "cow").index(label.decode())
                        expected.append((member.name, *image_size(data), name, *place))
                    except UnreadableImageError as error:
                        left_out.append((member.name, str(error)))
    columns = (index.width, index.height, index.label, index.shard, index.offset, index.size)
    assert list(zip(index.names, *(column.tolist() for column in columns), strict=True)) == expected
    assert list(index.quarantine) == left_out
    assert len(left_out) == 2
    assert list(index.shards) == [f"{number}.tar" for number in range(5)]
    assert index.classes == ("ant", "bee", "cow")
    assert index.notes == ("passed over: files of other kinds 5 (notes_0.txt, ...)",)
    assert index.found_labels.tolist() == [0, 1, 2]


def saved_set(photographs: Path, folder: Path) -> Path:
    index = scan_folder(photographs)
    images: list[dict[str, object] | None] = [
        {"bytes": (photographs / name).read_bytes(), "path": None} for name in index.names
    ]
    images[4] = None
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["x", "y", "z"])})
    rows = {"image": images, "label": index.label.tolist()}
    Dataset.from_dict(rows, features=features).save_to_disk(folder, num_shards=3)
    return folder


def tree(photographs: Path, folder: Path) -> Path:
    """Classes with folders inside, one of them linked, and a damaged file."""
    for file in photographs.glob("*/*.jpg"):
        inside = folder / file.parent.name / ("b" if file.stem < "10" else "a")
        inside.mkdir(parents=True, exist_ok=True)
        (inside / file.name).write_bytes(file.read_bytes())
    (folder / "bee/broken.jpg").write_bytes(b"no image")
    (folder / "bee/x.txt").write_bytes(b"passed over")
    (folder / "dog").symlink_to(photographs / "ant")
    return folder


@pytest.mark.parametrize("write", [shards, saved_set, tree])
def test_made_in_parallel_or_at_once(
    write: Callable[[Path, Path], Path], photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte the same files, whatever the workers and the length of a chunk."""
    source = write(photographs, tmp_path / "data")
    listing = read_sizes(list_source(source))
    save_index(listing, tmp_path / "index")
    at_once = content(tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "other")
    monkeypatch.setattr("megatron_nepa.data.indexing.build._CHUNK", 4)
    index = build_and_save_index(open_source(source), tmp_path / "index", workers=2, progress=False)
    assert content(tmp_path / "index") == at_once
    assert index.notes == listing.notes
    if write is tree:  # by class, then by path, whatever folders lie between
        assert list(index.names) == sorted(index.names, key=lambda name: (name.split("/")[0], name))
    assert not (tmp_path / "index.partial").exists()


def test_killed_and_continued(photographs: Path, tmp_path: Path) -> None:
    """Killed while it lists, while it checks and while it writes: no finished part is made again, none taken half."""
    folder = shards(photographs, tmp_path / "shards")
    at_once = read_sizes(list_source(folder))
    save_index(at_once, tmp_path / "index")
    expected = content(tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "other")
    log = tmp_path / "log"
    script = Path(killed_indexing.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    kills = ["3", "5", "index"]
    subprocess.run([sys.executable, script, folder, tmp_path / "index", log, *kills], check=True, env=environment)
    assert content(tmp_path / "index") == expected
    assert not (tmp_path / "index.partial").exists()
    done = Counter(log.read_text().split("\n"))
    lengths = [len(range(number, 37, 5)) for number in range(5)]
    chunks = [f"{n:06d}_{start:09d}" for n in range(5) for start in range(0, lengths[n], killed_indexing.CHUNK)]
    saved = {f"saved {stem}": 1 for stem in [f"{n:06d}" for n in range(5)] + chunks}
    read = {f"read {number}": 2 if number == 2 else 1 for number in range(5)}
    assert done - Counter({"": 1}) == Counter(saved | read)


def test_what_changed_meanwhile_is_read_again(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was replaced, and a part that the disk lost half of, are made anew; another shard is refused."""
    folder = shards(photographs, tmp_path / "shards")
    out = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr("megatron_nepa.data.indexing.build._write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_and_save_index(open_source(folder), out, workers=1, progress=False)
    (folder / "3.tar").write_bytes((folder / "0.tar").read_bytes())
    part, checked = (
        tmp_path / "index.partial/000002.safetensors",
        tmp_path / "index.partial/000001_000000000.safetensors",
    )
    for file in (part, checked):
        os.truncate(file, file.stat().st_size // 2)
    build_and_save_index(open_source(folder), out, workers=1, progress=False)
    save_index(read_sizes(list_source(folder)), tmp_path / "other")
    assert content(out) == content(tmp_path / "other")


def links(shard: Path, folder: Path, count: int) -> Path:
    """A folder of many shards, which are one."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.tar").symlink_to(shard)
    return folder


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(photographs: Path, tmp_path: Path) -> None:
    """Peak memory for 3,700 images in 100 shards, and for ten times as many."""
    write_shards(scan_folder(photographs), tmp_path / "one", 37, progress=False)
    code = (
        "import resource, sys\n"
        "from megatron_nepa.data.index.sources import open_source\n"
        "from megatron_nepa.data.indexing.build import build_and_save_index\n"
        "if __name__ == '__main__':\n"
        "    build_and_save_index(open_source(sys.argv[1]), sys.argv[2], workers=1, progress=False)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    (tmp_path / "script.py").write_text(code)
    peaks = []
    for count in (100, 1000):
        folder = links(tmp_path / "one/shard_000000.tar", tmp_path / f"shards_{count}", count)
        command = [sys.executable, str(tmp_path / "script.py"), str(folder), str(tmp_path / f"index_{count}")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks.append(int(result.stdout) / 1024)
        assert len(load_index(tmp_path / f"index_{count}")) == 37 * count
    assert peaks[1] < peaks[0] + 8  # MB; all names and places of the larger set are 2.5 MB, as objects 20 MB
