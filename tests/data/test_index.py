"""What a folder holds, and what is said when it holds nothing usable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.index import builtin
from megatron_nepa.data.index.builtin import PHOTOGRAPHS, builtin_folder, builtin_index
from megatron_nepa.data.index.dataset_index import PackedNames
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.pretraining import build_index


def test_image_folder_tree(photographs: Path) -> None:
    """Every image once, sorted, with its stored size and its class folder's number."""
    index = scan_folder(photographs)
    assert index.classes == ("ant", "bee", "cow")
    files = sorted(str(path.relative_to(photographs)) for path in photographs.rglob("*.jpg"))
    assert [index.names[i] for i in range(len(index))] == files
    for i, name in enumerate(files):
        with Image.open(photographs / name) as image:
            assert (index.width[i], index.height[i]) == image.size
        assert index.classes[index.label[i]] == name.split("/")[0]
    assert not index.quarantine


def test_flat_folder_and_place_independence(photographs: Path, tmp_path: Path) -> None:
    """A flat folder has no labels; a copied tree has the same fingerprint, a changed one another."""
    flat = tmp_path / "flat"
    shutil.copytree(photographs / "bee", flat)
    index = scan_folder(flat)
    assert len(index) == len(list(flat.iterdir()))
    assert (index.label == -1).all()
    assert index.classes == ()
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy)
    assert scan_folder(copy).fingerprint() == scan_folder(photographs).fingerprint()
    (copy / "ant" / "00.jpg").rename(copy / "cow" / "00.jpg")
    assert scan_folder(copy).fingerprint() != scan_folder(photographs).fingerprint()


def test_a_link_that_leads_back_is_not_followed(photographs: Path, tmp_path: Path) -> None:
    """A link to another place is, as it always was."""
    for name in ("ant", "bee"):
        shutil.copytree(photographs / name, tmp_path / "data" / name)
    (tmp_path / "data/cow").symlink_to(photographs / "cow")
    (tmp_path / "data/all").symlink_to(tmp_path / "data")
    (tmp_path / "data/ant/up").symlink_to("..")
    assert scan_folder(tmp_path / "data").fingerprint() == scan_folder(photographs).fingerprint()


def test_names_survive_packing() -> None:
    """Non-ASCII, undecodable and empty names come back as they were."""
    names = ["a.jpg", "", "ä/Übung 1.png", os.fsdecode(b"\xff\xfe.jpg"), "z"]
    packed = PackedNames.pack(names)
    assert [packed[i] for i in range(len(packed))] == names


def test_unreadable_images_are_quarantined(photographs: Path, tmp_path: Path) -> None:
    """Each bad file is left out by name with its reason; the good ones stay."""
    good = (photographs / "ant" / "00.jpg").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "e.gif")
    (tmp_path / "a.jpg").write_bytes(good)
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"<html>404</html>" * 50)
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    (tmp_path / "f.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    index = scan_folder(tmp_path)
    assert [index.names[i] for i in range(len(index))] == ["a.jpg"]
    reasons = dict(index.quarantine)
    # a dangling link is no file at all and is not listed
    assert set(reasons) == {"b.jpg", "c.jpg", "d.png", "e.gif"}
    assert reasons["b.jpg"] == "empty file"
    assert reasons["c.jpg"].startswith("not a JPEG")
    assert reasons["d.png"].startswith("damaged header")
    assert reasons["e.gif"].startswith("not a JPEG")


def one_sentence(error: pytest.ExceptionInfo[ConfigError], *parts: str) -> None:
    """The message is one line that holds every part."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert part in message


def test_folders_without_images_are_refused(photographs: Path, tmp_path: Path) -> None:
    """Missing, a file, empty, nothing readable, mixed: one sentence each, naming the path."""
    with pytest.raises(ConfigError) as error:
        build_index(DataConfig(path=str(tmp_path / "nowhere")))
    one_sentence(error, str(tmp_path / "nowhere"), "does not exist")
    file = tmp_path / "a.txt"
    file.write_text("x")
    with pytest.raises(ConfigError) as error:
        build_index(DataConfig(path=str(file)))
    one_sentence(error, str(file), "is a file")
    with pytest.raises(ConfigError) as error:
        build_index(DataConfig(path=str(tmp_path)))
    one_sentence(error, str(tmp_path), "holds no images")
    (tmp_path / "shard.tar").write_bytes(b"")
    with pytest.raises(ConfigError) as error:
        build_index(DataConfig(path=str(tmp_path)))
    one_sentence(error, str(tmp_path), "holds tar shards", "tools/index_dataset.py")
    (tmp_path / "shard.tar").unlink()
    (tmp_path / "x.jpg").write_bytes(b"no")
    with pytest.raises(ConfigError) as error:
        build_index(DataConfig(path=str(tmp_path)))
    one_sentence(error, "none of the 1 image file", "x.jpg: not a JPEG")
    (tmp_path / "class").mkdir()
    shutil.copy(photographs / "ant" / "00.jpg", tmp_path / "class")
    with pytest.raises(ConfigError) as error:
        build_index(DataConfig(path=str(tmp_path)))
    one_sentence(error, "beside class folders (class, ...)")


def test_synthetic_needs_no_index() -> None:
    """The word synthetic names no folder."""
    assert build_index(DataConfig(path="synthetic")) is None


def test_builtin_set(cache: Path) -> None:
    """1,803 crops of 18 photographs, in class folders named after them."""
    index = scan_folder(cache)
    assert len(index) == 1803
    assert len(index.classes) == sum(len(names) for names in PHOTOGRAPHS.values())
    assert np.minimum(index.width, index.height).min() >= 160
    assert np.maximum(index.width, index.height).max() <= 256
    assert not index.quarantine


def test_builtin_set_is_opened_by_its_index_without_a_look_at_an_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    """The index says what a scan says; a damaged one, or a cache that cannot be written, costs a scan."""
    monkeypatch.setenv("MEGATRON_NEPA_CACHE", str(tmp_path))
    (tmp_path / cache.name).symlink_to(cache)
    scanned = scan_folder(cache)
    builtin_index()
    with monkeypatch.context() as patch:
        patch.setattr(builtin, "scan_folder", None)
        index = builtin_index()
    assert index.fingerprint() == scanned.fingerprint()
    assert index.classes == scanned.classes
    assert (index.root / index.names[5]).read_bytes() == (scanned.root / scanned.names[5]).read_bytes()
    (tmp_path / f"{cache.name}.index/width.npy").write_bytes(b"")
    assert builtin_index().fingerprint() == scanned.fingerprint()


def test_builtin_set_is_written_whole_by_racing_processes(tmp_path: Path, cache: Path) -> None:
    """Two processes that start together both get the one complete set, and leave nothing beside it."""
    code = """
from megatron_nepa.data.index.builtin import builtin_folder
print(len(list(builtin_folder().glob("*/*.jpg"))))
"""
    environment = os.environ | {"MEGATRON_NEPA_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.split()[-1] == "1803"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.name]


def test_builtin_set_needs_a_writable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that cannot be written is one sentence that names the way out."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MEGATRON_NEPA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError) as error:
        builtin_folder()
    one_sentence(error, str(tmp_path / "file"), "MEGATRON_NEPA_CACHE")
