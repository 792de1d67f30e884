"""What a folder or a tar file holds is what is listed, or one sentence says why not."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index import walk as walking
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import read_sizes
from megatron_nepa.data.index.headers import InaccessibleImageError
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.index.storage import ImageStore, read_mask
from megatron_nepa.data.indexing.write_shards import write_shards

PIXEL = b"\xff\xd8\xff images are not decoded here"


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def labels_by_name(index: DatasetIndex) -> dict[str, int | str]:
    names = [index.names[i] for i in range(len(index))]
    return {
        name: index.classes[k] if k >= 0 and index.classes else int(k)
        for name, k in zip(names, index.label, strict=True)
    }


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PIXEL)


def test_what_is_passed_over_in_a_folder(tmp_path: Path) -> None:
    """Hidden entries at any depth, pipes, links that lead nowhere or to what is listed: counted, never images."""
    fill(tmp_path, "cat/1.jpg", "dog/deep/2.jpg", "cat/._1.jpg", "dog/.ipynb_checkpoints/2.jpg", "__MACOSX/cat/1.jpg")
    fill(tmp_path, "backup.tar", "cat/notes.txt")
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    (tmp_path / "cat/gone.jpg").symlink_to("nowhere")
    (tmp_path / "cat/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "cat/dogs").symlink_to("../dog")
    (tmp_path / "dog/cats").symlink_to("../cat")
    (tmp_path / "ox").mkdir()
    index = list_source(tmp_path)
    assert labels_by_name(index) == {"cat/1.jpg": "cat", "dog/deep/2.jpg": "dog"}
    kinds = ("hidden entries 3", "links to folders that are listed already or hold them 2", "links that lead nowhere 2")
    kinds += ("entries that are neither file nor folder 1", "archives 1", "files of other kinds 1")
    for part in (*kinds, "folders without images 1"):
        assert part in index.notes[0]


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (("train", "val"), "give one of them"),
        (("images", "masks"), "call the folders images and annotations"),
        (("Image", "labels"), "call the folders images and annotations"),
        (("images", "cats"), None),
        (("masks", "swords"), None),
    ],
)
def test_folders_that_are_hardly_classes_are_said(folders: tuple[str, str], advice: str | None, tmp_path: Path) -> None:
    fill(tmp_path, *(f"{folder}/1.jpg" for folder in folders))
    notes = list_source(tmp_path).notes
    assert len(notes) == (advice is not None)
    assert advice is None or (f"its classes are {', '.join(folders)}: if" in notes[0] and advice in notes[0])


def test_classes_that_look_alike_are_said(tmp_path: Path) -> None:
    fill(tmp_path, "\u00e9/1.jpg", "e\u0301/1.jpg", "ox/1.jpg")
    assert list_source(tmp_path).notes == (r"its classes 'e\u0301' and '\xe9' look alike: are they one?",)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth, whatever the system says."""
    fill(tmp_path, "cat/1.jpg", "dog/deep/2.jpg")
    real = os.scandir

    def failing(path: Path) -> object:
        if Path(path).name == "deep":
            raise OSError(116, "Stale file handle")
        return real(path)

    monkeypatch.setattr(walking.os, "scandir", failing)
    with pytest.raises(ConfigError, match=r"dog/deep cannot be read \(stale file handle\)"):
        list_source(tmp_path)


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        ({"0.rgb.jpg": PIXEL, "0.cls": b"3\n", "1.jpg": PIXEL, "1.cls": b" 4"}, {"0.rgb.jpg": 3, "1.jpg": 4}),
        ({"a.b/0.jpg": PIXEL, "a.b/0.cls": b"1", "c/0.JPG": PIXEL, "c/0.CLS": b"2.0"}, {"a.b/0.jpg": 1, "c/0.JPG": 2}),
        ({"0.v1.jpg": PIXEL, "0.v1.cls": b"1", "0.v2.jpg": PIXEL, "0.v2.cls": b"2"}, {"0.v1.jpg": 1, "0.v2.jpg": 2}),
        ({"0.jpg": PIXEL, "0.cls": b"\xef\xbb\xbf10"}, {"0.jpg": 10}),
        ({"0.jpg": PIXEL, "0.cls.txt": b"5"}, {"0.jpg": 5}),
        (
            {"0.jpg": PIXEL, "0.cls": b"big ox", "1.jpg": PIXEL, "1.json": b'{"label": "ant"}'},
            {"0.jpg": "big ox", "1.jpg": "ant"},
        ),
        ({"0.jpg": PIXEL, "0.cls": b"1", "1.jpg": PIXEL, "1.json": b"["}, {"0.jpg": 1, "1.jpg": -1}),
        ({"0.jpg": PIXEL, "._0.jpg": PIXEL, "__MACOSX/0.jpg": PIXEL}, {"0.jpg": -1}),
        ({"./d/cat/deep/0.jpg": PIXEL, "./d/dog/1.jpg": PIXEL}, {"d/cat/deep/0.jpg": "cat", "d/dog/1.jpg": "dog"}),
    ],
)
def test_labels_in_an_archive(tmp_path: Path, members: dict[str, bytes], labels: dict[str, int | str]) -> None:
    write_tar(tmp_path / "s.tar", list(members.items()))
    assert labels_by_name(list_source(tmp_path)) == labels


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.jpg": PIXEL, "0.cls": b"1", "0.json": b"2"}, "two labels, 1 in 0.cls and 2 in 0.json"),
        ({"0.jpg": PIXEL, "0.cls": b"1", "1.jpg": PIXEL, "1.cls": b"ox"}, "mixes numbers and names"),
        ({"0.jpg": PIXEL, "0.cls": b"-1"}, "holds the label -1"),
        ({"0.jpg": PIXEL, "0.cls": b"1\n2"}, "more than one line"),
        ({"0.jpg": PIXEL, "cat/1.jpg": PIXEL}, "hold 1 image beside class folders"),
        ({"0.jpg": PIXEL, "b.tar.gz": b"x"}, "no plain tar file"),
        ({"0.cls": b"1"}, "hold no images"),
    ],
)
def test_archives_that_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "s.tar", list(members.items()))
    with pytest.raises(ConfigError, match=message):
        list_source(tmp_path)


@pytest.mark.parametrize(
    ("members", "notes"),
    [
        ({"0.jpg": PIXEL, "0.json": b'{"caption": "x"}'}, ("1 JSON file without a label",)),
        ({"0.jpg": PIXEL, "0.json": b'{"label": NaN}'}, ("1 JSON file without a label",)),
        (
            {"0.jpg": PIXEL, "0.cls": b"1", "1.jpg": PIXEL, "1.json": b"[", "2.jpg": PIXEL, "2.json": b"{}"},
            ("2 images without a label", "labels go up to 1", "2 JSON files without a label"),
        ),
        ({"0.jpg": PIXEL, "0.cls": b"0", "7.cls": b"0", "8.v2.cls": b"1"}, ("2 label files without an image",)),
        ({"0.jpg": PIXEL, "0.png": PIXEL, "0.cls": b"0"}, ("1 image with the key",)),
        ({"0.v1.jpg": PIXEL, "0.v1.cls": b"0", "0.cls": b"0"}, ()),
        ({"a/0.jpg": PIXEL, "b/0.cls": b"0"}, ("1 label file without an image",)),
    ],
)
def test_what_an_archive_holds_besides_is_counted(
    tmp_path: Path, members: dict[str, bytes], notes: tuple[str, ...]
) -> None:
    write_tar(tmp_path / "s.tar", list(members.items()))
    found = list_source(tmp_path).notes
    assert len(found) == len(notes), found
    assert all(note.startswith(start) for note, start in zip(found, notes, strict=True)), found


@pytest.mark.parametrize(("mode", "kind"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_compressed_archives_are_refused(tmp_path: Path, mode: str, kind: str) -> None:
    """By their name, and where the name hides it."""
    write_tar(tmp_path / f"a.tar.{mode}", [("0.jpg", PIXEL)], f"w:{mode}")
    with pytest.raises(ConfigError, match=rf"a\.tar\.{mode} is no plain tar file"):
        list_source(tmp_path)
    (tmp_path / f"a.tar.{mode}").rename(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match=rf"a\.tar is compressed \({kind}\): .* so unpack it\.$"):
        list_source(tmp_path / "a.tar")


def test_joined_archives_are_refused(tmp_path: Path) -> None:
    """The second would be left out: tar's readers stop at the mark of the first one's end."""
    write_tar(tmp_path / "s.tar", [("0.jpg", PIXEL)])
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes() * 2)
    with pytest.raises(ConfigError, match=r"s\.tar holds more behind the mark of its end .* pack it again\.$"):
        list_source(tmp_path)


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    """As what they are: they store less than their size, as a file that is cut short does."""
    (tmp_path / "0.jpg").write_bytes(PIXEL)
    os.truncate(tmp_path / "0.jpg", 1 << 20)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "s.tar", "-C", tmp_path, "0.jpg"], check=True)
    with pytest.raises(ConfigError, match=r"s\.tar holds 0\.jpg as a sparse file"):
        list_source(tmp_path / "s.tar")


def test_what_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    """Shards in folders below, and what has a shard's name alone, are not read."""
    write_tar(tmp_path / "s.tar", [("0.jpg", PIXEL)])
    (tmp_path / "classes.json").write_text('["ox"]')
    assert list_source(tmp_path).notes == ()
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more/t.tar", [("0.jpg", PIXEL)])
    os.mkfifo(tmp_path / "u.tar")
    (note,) = list_source(tmp_path).notes
    assert "archives 1 (more/t.tar)" in note
    assert "neither file nor folder 1 (u.tar)" in note


def test_links_inside_an_archive(tmp_path: Path) -> None:
    """Are what they lead to; one that leads out of the archive is refused."""
    write_tar(tmp_path / "s.tar", [("cat/0.jpg", PIXEL)])
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        for name, kind, target in (
            ("dog/1.jpg", tarfile.LNKTYPE, "cat/0.jpg"),
            ("dog/2.jpg", tarfile.SYMTYPE, "1.jpg"),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, target
            archive.addfile(header)
    index = list_source(tmp_path)
    assert labels_by_name(index) == {"cat/0.jpg": "cat", "dog/1.jpg": "dog", "dog/2.jpg": "dog"}
    assert len(set(index.offset.tolist())) == 1
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        header.name, header.linkname = "dog/3.jpg", "/elsewhere.jpg"
        archive.addfile(header)
    with pytest.raises(ConfigError, match=r"dog/3\.jpg as a link to /elsewhere\.jpg, which it does not hold"):
        list_source(tmp_path)


names = st.builds(
    lambda folder, stem, extension: f"{folder}x{stem}{extension}",
    st.sampled_from(["", "a/", "a.b/"]),
    st.text("01._", max_size=3),
    st.sampled_from([".jpg", ".png", ".JPG"]),
)


def test_packing_keeps_every_label(tmp_path: Path, examples: Callable[[Callable[[], None]], None]) -> None:
    """Whatever the names and however the labels are numbered; the order of the images stays as well."""

    @given(st.lists(st.tuples(names, st.integers(0, 3)), min_size=1, max_size=6, unique_by=lambda pair: pair[0]))
    def holds(pairs: list[tuple[str, int]]) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for number, (name, _) in enumerate(pairs):
            fill(tmp_path / "in", name)
            (tmp_path / "in" / name).write_bytes(PIXEL + bytes([number]))
        sizes, labels = np.ones(len(pairs), np.int32), np.array([label for _, label in pairs], np.int32)
        index = DatasetIndex(tmp_path / "in", PackedNames.pack(name for name, _ in pairs), sizes, sizes, labels)
        write_shards(index, tmp_path / "out", 4, workers=1, progress=False)
        packed = list_source(tmp_path / "out")
        assert packed.label.tolist() == labels.tolist()
        contents = [
            (tmp_path / "out" / packed.shards[packed.shard[i]]).read_bytes()[packed.offset[i] :][: packed.size[i]][-1]
            for i in range(len(packed))
        ]
        assert contents == list(range(len(pairs)))

    examples(holds)


def test_damaged_archives_end_in_a_sentence(tmp_path: Path, examples: Callable[[Callable[[], None]], None]) -> None:
    """Any cut and any changed bytes: every image with its label, or a refusal; never a traceback or a hang."""
    truth = {f"{i}.jpg": i for i in range(3)}
    members = [m for i in range(3) for m in ((f"{i}.jpg", PIXEL), (f"{i}.cls", str(i).encode()))]
    write_tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()[: 14 * 512]

    @given(st.integers(0, len(whole)), st.lists(st.tuples(st.integers(0, 512 * 12), st.integers(0, 255)), max_size=3))
    def holds(length: int, changes: list[tuple[int, int]]) -> None:
        content = bytearray(whole[:length])
        for place, byte in changes:
            if place < len(content):
                content[place] = byte
        (tmp_path / "s.tar").write_bytes(content)
        try:
            index = list_source(tmp_path / "s.tar")
        except ConfigError:
            return
        if not changes:
            assert labels_by_name(index) == truth

    examples(holds)


@pytest.mark.parametrize("value", ['{"a": 1}', "[1]", '["a", "a"]', "x"])
def test_class_names_beside_shards(tmp_path: Path, value: str) -> None:
    write_tar(tmp_path / "s.tar", [("0.jpg", PIXEL), ("0.cls", b"1")])
    (tmp_path / "classes.json").write_bytes(json.dumps(["ox", "ant"]).encode("utf-8-sig"))
    assert labels_by_name(list_source(tmp_path)) == {"0.jpg": "ant"}
    (tmp_path / "classes.json").write_text(value)
    with pytest.raises(ConfigError, match="repair it"):
        list_source(tmp_path)


def test_an_image_that_the_system_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no bad image, which would be left out: nothing is known about it."""
    fill(tmp_path, "cat/1.jpg", "dog/2.jpg")

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ConfigError, match=r"cat/1\.jpg cannot be read: permission denied\."):
        read_sizes(list_source(tmp_path))


def test_what_becomes_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """An image, a mask and a shard that were files when they were listed."""
    fill(tmp_path, "flat/1.jpg", "pairs/images/1.jpg", "pairs/annotations/1.png")
    write_tar(tmp_path / "s.tar", [("1.jpg", PIXEL)])
    sources = [list_source(tmp_path / name) for name in ("flat", "pairs", "s.tar")]
    for name in ("flat/1.jpg", "pairs/annotations/1.png", "s.tar"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    for read in (ImageStore(sources[0]).read, partial(read_mask, sources[1]), ImageStore(sources[2]).read):
        with pytest.raises(InaccessibleImageError, match="no regular file"):
            read(0)


entries = st.tuples(
    st.sampled_from(["cat", "dog", "dog/deep", "a b", ".cache", "dog/__MACOSX"]),
    st.sampled_from(["0.jpg", "1.PNG", "._0.jpg", "notes.txt", "0.jpg.part", "old.zip"]),
)
links = st.tuples(st.sampled_from(["cat", "dog", "a b", "."]), st.sampled_from(["cat", "dog", "a b", ".", ".."]))


def test_every_tree_is_listed_once(tmp_path: Path, examples: Callable[[Callable[[], None]], None]) -> None:
    """Every image once, with the class of the folder that it really lies in, whatever links lie about."""

    @given(st.sets(entries, min_size=1), st.lists(links, max_size=4))
    def holds(files: set[tuple[str, str]], led: list[tuple[str, str]]) -> None:
        root = tmp_path / "tree"
        shutil.rmtree(root, ignore_errors=True)
        fill(root, *("/".join(file) for file in files))
        for number, (place, target) in enumerate(led):
            (root / place).mkdir(exist_ok=True)
            (root / place / f"link{number}").symlink_to(os.path.relpath(root / target, root / place))
        truth = {
            f"{folder}/{name}": folder.split("/")[0]
            for folder, name in files
            if name in ("0.jpg", "1.PNG") and folder not in (".cache", "dog/__MACOSX")
        }
        if truth:
            assert labels_by_name(list_source(root)) == truth
        else:
            with pytest.raises(ConfigError, match=r"no images|no plain tar file"):
                list_source(root)

    examples(holds)
