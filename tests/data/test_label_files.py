"""Labels files, written and generated: each image gets its own label, or one sentence refuses the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.labels import with_labels

TREE = ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg")
FLAT = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
PATHS = "cat/0.jpg 0\ncat/1.jpg 0\ndog/0.jpg 1\ndog/1.jpg 1\n"


def listing(names: tuple[str, ...]) -> DatasetIndex:
    """Images that need not exist."""
    sizes = np.zeros(len(names), np.int32)
    return DatasetIndex(Path("/data"), PackedNames.pack(names), sizes, sizes, sizes - 1)


def labels_of(names: tuple[str, ...], content: bytes, folder: Path) -> DatasetIndex:
    (folder / "labels.txt").write_bytes(content)
    return with_labels(listing(names), folder / "labels.txt")


@pytest.mark.parametrize(
    ("names", "content", "labels", "note"),
    [
        (TREE, PATHS.encode(), [0, 0, 1, 1], ""),
        (TREE, PATHS.encode("utf-8-sig"), [0, 0, 1, 1], ""),
        (TREE, PATHS.encode("utf-16"), [0, 0, 1, 1], ""),
        (TREE, PATHS.replace("\n", " \r\n\r\n").encode(), [0, 0, 1, 1], ""),
        (TREE, PATHS.replace("\n", "\r").encode(), [0, 0, 1, 1], ""),
        (TREE, PATHS.replace("/", "\\").encode(), [0, 0, 1, 1], ""),
        (TREE, "".join(f"./{line}\n" for line in PATHS.splitlines()).encode(), [0, 0, 1, 1], ""),
        (TREE, "".join(f"/data/{line}\n" for line in PATHS.splitlines()).encode(), [0, 0, 1, 1], ""),
        (TREE, "".join(f"data/{line}\n" for line in PATHS.splitlines()).encode(), [0, 0, 1, 1], ""),
        (TREE, PATHS.replace(" ", "\t").encode(), [0, 0, 1, 1], ""),
        (TREE, PATHS.replace(" ", ",").encode(), [0, 0, 1, 1], "split at a comma"),
        (TREE, PATHS.replace(" ", ";").encode(), [0, 0, 1, 1], "split at a semicolon"),
        (TREE, ("name,label\n" + PATHS.replace(" ", ",")).encode(), [0, 0, 1, 1], "taken for a header"),
        (TREE, (PATHS + "cat/0.jpg 0\n").encode(), [0, 0, 1, 1], "1 line of its labels file said twice (line 5)"),
        (TREE, (PATHS + "cow/0.jpg 7\n").encode(), [0, 0, 1, 1], "1 line of its labels file without an image (line 5)"),
        (FLAT, b"x/d.jpg 3\nx/c.jpg 2\nx/b.jpg 1\nx/a.jpg 0\n", [0, 1, 2, 3], "a label of its own"),
        (FLAT, b'"a.jpg","ox, big"\n"b.jpg",ant\nc.jpg,ant\nd.jpg,ant\n', [1, 0, 0, 0], "split at a comma"),
        (("my a.jpg", "my b.jpg"), b"my b.jpg 1\nmy a.jpg 0\n", [0, 1], ""),
        (FLAT, b"a.jpg big ox\nb.jpg ant\nc.jpg ant\nd.jpg ant\n", [1, 0, 0, 0], "the first space"),
        (FLAT, b"10\n2\n10\n2\n", [10, 2, 10, 2], "no image has 9 of them (such as 0)"),
        (FLAT, b"007\n010\n007\n010\n", [7, 10, 7, 10], ""),
        (FLAT, b"1.0\n0.000e+00\n+1\n0\n", [1, 0, 1, 0], ""),
        (FLAT, b"ox\nant\nox\nant", [1, 0, 1, 0], ""),
        (FLAT, b'"11"\n"2"\n"11"\n"2"\n', [11, 2, 11, 2], ""),
        (FLAT, "ox\n\ufeffox\nant\u200b\nant\n".encode(), [1, 1, 0, 0], ""),
        (FLAT, "a.jpg é\n\ufeffb.jpg e\u0301\nc.jpg ox\nd.jpg ox\n".encode(), [1, 1, 0, 0], ""),
        (("e\u0301.jpg", "a.jpg"), "a.jpg 0\né.jpg 1\n".encode(), [1, 0], ""),
        (("e\u0301.jpg", "é.jpg"), "é.jpg 0\ne\u0301.jpg 1\n".encode(), [1, 0], ""),
        (FLAT, b"Ox\nox\nant\nant\n", [0, 2, 1, 1], "its classes 'Ox' and 'ox' look alike"),
        (
            FLAT,
            b"x/a.jpg 0\nx/b.jpg 0\nx/c.jpg 1\nx/d.jpg 1\n",
            [0, 0, 1, 1],
            "lead elsewhere (x/a.jpg) and are taken as",
        ),
    ],
)
def test_labels_files_that_are_read(
    tmp_path: Path, names: tuple[str, ...], content: bytes, labels: list[int], note: str
) -> None:
    index = labels_of(names, content, tmp_path)
    assert index.label.tolist() == labels
    assert note in "; ".join(index.notes)


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (FLAT, b"", "holds no labels"),
        (FLAT, b"0\n1\n0\n", "holds 3 labels for the 4 images"),
        (FLAT, b"label\n0\n1\n0\n1\n", r"is line 1 \(label\) a header"),
        (FLAT, b"0\n1\ncat\n1\n", "line 1 holds 0 and line 3 'cat'"),
        (FLAT, b"0\n1\n-1\n1\n", "line 3 of .* holds the label -1; a class number is whole"),
        (FLAT, b"0\n1\n0.5\n1\n", "line 3 of .* holds the label 0.5"),
        (FLAT, b"0\n1\n1e+99999999999999999999\n1\n", "line 3 of .* holds the label 1e.9999"),
        (FLAT, b"nan\ninf\nox\nox\n", "line 1 of .* holds the label nan; a class number is whole"),
        (FLAT, b"a.jpg|0\nb.jpg|1\nc.jpg|0\nd.jpg|1\n", r"holds the label a.jpg\|0, which names an image"),
        (FLAT, b"a.jpg b.jpg\nb.jpg c.jpg\nc.jpg d.jpg\nd.jpg a.jpg\n", "holds the label b.jpg, which names an image"),
        (FLAT, b"a.jpg 0 1\nb.jpg 1 0\nc.jpg 0 1\nd.jpg 1 1\n", r"holds several numbers \(0 1\)"),
        (FLAT, b"label\nox\nant\nant\n", r"line 1 of .* \(label\) reads like a header, without which 3 labels"),
        (FLAT, b"0\n1\n99999999999\n1\n", "line 3 of .* holds the label 99999999999"),
        (FLAT, b"7\n007\n1\n1\n", "the class number 7 in two ways, 007 in line 2 and 7 in line 1"),
        (FLAT, b"\xff0\n1\n0\n1\n", "line 1 of .* no UTF-8"),
        (FLAT, "0\n1\n0\n1\n".encode("utf-16-le"), "no text in UTF-8"),
        (FLAT, b"z.jpg 0\ny.jpg 1\nx.jpg 0\nw.jpg 1\n", "line 1 .* neither a label alone"),
        (FLAT, b"a.jpg 0\nb.jpg 0\nc.jpg 0\n", r"no label for 1 of the 4 images of /data \(d.jpg\)"),
        (FLAT, b"a.jpg 0\nb.jpg 0\nc.jpg 0\nd.jpg\n", r"line 4 of .* \(d.jpg\) is no name and label"),
        (FLAT, b"a.jpg 0\nb.jpg 0\nc.jpg 0\nd.jpg 0\na.jpg 1\n", "gives a.jpg the label 0 in line 1 and 1 in line 5"),
        (TREE, b"0.jpg 0\n1.jpg 1\n", "no label for|neither a label"),
        (TREE, b"0\n0\n1\n1\n", "ambiguous where images of /data have the same name"),
        (TREE, PATHS.replace("dog/1", "cow/1").encode(), r"no label for 1 of the 4 images of /data \(dog/1.jpg\)"),
        (("1.jpg", "10.jpg", "2.jpg"), b"0\n1\n0\n", "read in two ways, 10.jpg or 2.jpg being number 2"),
        (("B.jpg", "a.jpg"), b"0\n1\n", "read in two ways, B.jpg or a.jpg being number 1"),
    ],
)
def test_labels_files_that_are_refused(tmp_path: Path, names: tuple[str, ...], content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        labels_of(names, content, tmp_path)
    assert "\n" not in str(error.value)


parts = st.text("ab0 1._-é", min_size=1, max_size=4).map(lambda part: f"x{part}".strip().rstrip("."))
images = st.lists(
    st.builds("/".join, st.lists(parts, min_size=1, max_size=2)).map(lambda stem: f"{stem}.jpg"),
    min_size=2,
    max_size=6,
    unique=True,
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")


def test_every_image_gets_its_own_label(tmp_path: Path, examples: Callable[[Callable[[], None]], None]) -> None:
    """Shuffled lines of a name and a label, in every form that is read: the truth, or a refusal."""

    @given(
        images,
        st.data(),
        st.sampled_from([" ", "\t", ",", ";"]),
        st.sampled_from(["\n", "\r\n", "\r"]),
        st.sampled_from(ENCODINGS),
        st.booleans(),
        st.booleans(),
    )
    def holds(
        names: list[str], data: st.DataObject, delimiter: str, end: str, encoding: str, base_names: bool, numbers: bool
    ) -> None:
        kinds = st.integers(0, 12) if numbers else st.sampled_from(["ant", "bee", "big ox"])
        truth = data.draw(st.lists(kinds, min_size=len(names), max_size=len(names)))
        order = data.draw(st.permutations(range(len(names))))
        shown = [name.rsplit("/", 1)[-1] if base_names else name for name in names]
        text = end.join(f"{shown[i]}{delimiter}{truth[i]}" for i in order)
        try:
            index = labels_of(tuple(names), text.encode(encoding), tmp_path)
        except ConfigError:
            return
        read = [index.classes[label] if index.classes else int(label) for label in index.label]
        assert read == truth

    examples(holds)


def test_no_labels_file_is_a_traceback(tmp_path: Path, examples: Callable[[Callable[[], None]], None]) -> None:
    """Whatever the bytes: a label for each image, or one sentence."""

    @given(st.one_of(st.binary(max_size=40), st.text("ab.jpg 01-\n\r\t,;\"'é²\0", max_size=40).map(str.encode)))
    def holds(content: bytes) -> None:
        try:
            index = labels_of(("a.jpg", "b.jpg"), content, tmp_path)
        except ConfigError:
            return
        assert (index.label >= 0).all()

    examples(holds)
