"""Images that two sets share are found whatever form they lie in, and nothing else is taken for one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from index_tool import run_tool

from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.indexing import overlap as module
from megatron_nepa.data.indexing.overlap import Overlap, find_overlap
from tests.data.test_folders_and_archives import write_tar
from tests.runs import make_images


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """30 images as files, and 12 in a tar: 3 of them the same, one twice, and one with the same size and beginning."""
    root = tmp_path_factory.mktemp("sets")
    train = make_images(root / "train", 30)
    other = make_images(root / "other", 40)  # its first 30 are train's
    twin = bytearray((other / "035.jpg").read_bytes())
    (train / "twin.jpg").write_bytes(twin)
    twin[-200] ^= 1
    (root / "shards").mkdir()
    numbers = (3, 4, 29, *range(31, 35), *range(36, 39))
    members = [(f"{number}.jpg", (other / f"{number:03}.jpg").read_bytes()) for number in numbers]
    members += [("twin.jpg", bytes(twin)), ("again.jpg", (other / "004.jpg").read_bytes())]
    write_tar(root / "shards/val.tar", members)
    return train, root / "shards"


@pytest.mark.parametrize("head", [4096, 64])
def test_shared_images_are_found(sets: tuple[Path, Path], head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever set is the smaller, and also where beginnings alone would not tell."""
    monkeypatch.setattr(module, "_HEAD", head)
    monkeypatch.setattr(module, "_CHUNK", 4)
    train, val = (list_source(folder) for folder in sets)
    there = find_overlap(train, val, progress=False)
    back = find_overlap(val, train, progress=False)
    assert (there.first, there.second, there.unreadable) == (3, 4, 0)
    assert (back.first, back.second, back.unreadable) == (4, 3, 0)
    for found, at in ((there, 0), (back, 1)):
        for pair in found.examples:
            assert pair[at].startswith(str(sets[0]))
            assert Path(pair[at]).stem.lstrip("0") in (Path(pair[1 - at].partition(":")[2]).stem, "4")
    assert find_overlap(train, train, progress=False).first == 31


def test_images_that_cannot_be_read_are_counted(sets: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(sets[0], tmp_path / "train")
    listing = list_source(tmp_path / "train")
    (tmp_path / "train" / "003.jpg").unlink()
    (tmp_path / "train" / "029.jpg").write_bytes(b"x" * (sets[0] / "029.jpg").stat().st_size)
    found = find_overlap(listing, list_source(sets[1]), progress=False)
    assert (found.first, found.second, found.unreadable) == (1, 2, 2)


def test_the_tool_says_it_in_a_sentence(sets: tuple[Path, Path]) -> None:
    done = run_tool(sets[0], "--overlap", sets[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"4 of the 12 images of {sets[1]} (33.33%) are in {sets[0]} too, byte for byte, as 3")
    assert done.stdout.count("\n") == 1
    assert Overlap().describe("a", "b", 3) == "a and b share no image byte for byte."
    assert Overlap(unreadable=2).describe("a", "b", 3).endswith("byte for byte (2 images could not be read).")
    for wrong, said in (
        ((sets[0], "--overlap", sets[1], "--out", "x"), "drop --out"),
        ((sets[0], "--overlap", "missing"), "missing does not exist"),
        ((sets[0],), "give the folder of the index as --out, or a set to compare with as --overlap"),
    ):
        done = run_tool(*wrong)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
