"""Lists the images inside tar files, which stay as they are: an image is a range of bytes."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import EXTENSIONS
from megatron_nepa.data.index.label_values import Tally, decode_text, number_classes
from megatron_nepa.data.index.listing import Facts, Listed, Numbering, Source, kinds_of
from megatron_nepa.data.index.remote_shards import RemoteShard, open_stream, read_whole
from megatron_nepa.data.index.storage import shard_stamp
from megatron_nepa.data.index.tar_members import read_tar, require_plain
from megatron_nepa.data.index.walk import PassedOver, example
from megatron_nepa.data.remote.files import RemoteFiles
from megatron_nepa.data.remote.folder import RemoteFolder
from megatron_nepa.terminal import counted

CLASSES_FILE = "classes.json"  # beside tar shards: the class names, by number


class TarSource(Source):
    """The images of tar files.

    The label of an image is that of its WebDataset key (``key.cls``, ``key.cls.txt``, or ``"label"`` in ``key.json``),
    or of the file that differs from the image's in its extension alone (``a.v1.cls`` of ``a.v1.jpg``). Where no image
    has one, a tar inside a tar is a class, or else the first folder by which the members differ.

    Args:
        root: their folder, here or remote, which may hold ``classes.json``.
        tars: their names.
        notes: what the user should know of the choice of them.

    Raises:
        ConfigError: one of them is no plain tar file.
    """

    def __init__(self, root: Path | RemoteFolder, tars: Sequence[str], notes: tuple[str, ...] = ()) -> None:
        self.root, self.units, self._notes = root, tars, notes
        for name in tars:
            require_plain(name)

    def list(self, number: int) -> Listed:
        """The images of one tar file; what tells an image's class is its label, tar inside the tar and folder."""
        name = self.units[number]
        path = self.root / name
        stamp = shard_stamp(path)
        try:
            with _opened(path) as (file, size):
                found = read_tar(file, str(path), size)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
        images = found.images
        kind, kinds = kinds_of((image.kind for image in images), lambda i: f"the label of {images[i].name}")
        unknown = np.zeros(len(images), np.int32)
        listed = DatasetIndex(
            self.root,
            PackedNames.pack(image.name for image in images),
            unknown,
            unknown,
            kind,
            shards=(name,),
            shard=unknown,
            offset=np.array([image.offset for image in images], np.int64),
            size=np.array([image.size for image in images], np.int64),
            stamps=(stamp,),
        )
        return Listed(listed, Facts(len(images), kinds, found.passed_over, found.counters))

    def number(self, facts: Iterable[Facts]) -> Numbering:
        """Classes are the labels; without any, the tars inside the tars or the folders."""
        passed_over, counters, labels, places = PassedOver(), Counter[str](), Tally(), _Places()
        for unit in facts:
            passed_over.merge(unit.passed_over)
            counters.update(unit.counters)
            for kind in unit.kinds or ():
                label, group, folder = kind.what
                labels.add(label, kind.first, kind.images)
                places.add(group, folder, kind.first, kind.images)
            if any(label is not None for label in labels.count):
                places = _Places()  # they tell nothing then
        where = f"the tar files of {self.root}"
        require(
            bool(labels.count),
            f"{where} ({example(list(self.units))}) hold no images ({', '.join(sorted(EXTENSIONS))}).",
        )
        known = _read_classes(self.root / CLASSES_FILE)
        by_label = any(label is not None for label in labels.count)
        class_of = None if by_label else places.classes(self.root)
        numbers, classes, notes = number_classes(labels if class_of is None else places.tally(class_of), where, known)
        for counter, (singular, rest) in _SAID.items():
            if counters[counter]:
                notes += (f"{counted(counters[counter], singular)} {rest}",)

        def number(what: tuple[Any, ...]) -> int:
            label, group, folder = what
            return numbers[label if class_of is None else class_of(group, folder)]

        return Numbering(classes, (*self._notes, *passed_over.note(), *notes), number)


_SAID = {
    "shared_keys": ("image", "with the key, and so the label, of another in the tar file"),
    "json_without_label": ("JSON file", "without a label"),
    "labels_without_image": ("label file", "without an image"),
}


class _Places:
    """The tars inside tars, and the folders, that images lie in; in the order of first images."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str | None], tuple[int, str]] = {}

    def add(self, group: str, folder: str | None, first: str, images: int) -> None:
        before, first = self._found.get((group, folder), (0, first))
        self._found[group, folder] = before + images, first

    def tally(self, class_of: Callable[[str, str | None], str | None]) -> Tally:
        """How many images each class has."""
        tally = Tally()
        for (group, folder), (images, first) in self._found.items():
            tally.add(class_of(group, folder), first, images)
        return tally

    def classes(self, root: Path | RemoteFolder) -> Callable[[str, str | None], str | None]:
        """What tells the class of an image from its place: the tar inside a tar, or the first folder that differs."""
        if any(group for group, _ in self._found):
            return lambda group, folder: group or None
        parents = [_parts(folder) for _, folder in self._found]
        shared = 0  # folders that all have in common
        while parents and all(len(parts) > shared and parts[shared] == parents[0][shared] for parts in parents):
            shared += 1

        def class_of(group: str, folder: str | None) -> str | None:
            parts = _parts(folder)
            return parts[shared] if len(parts) > shared else None

        tally = self.tally(class_of)
        loose, grouped = tally.count.get(None, 0), next((name for name in tally.count if name is not None), None)
        require(
            not loose or grouped is None,
            f"the tar files of {root} hold {counted(loose, 'image')} beside class folders ({grouped}, ...) and no "
            "labels: keep every image in a class folder, or none.",
        )
        return class_of


def _parts(folder: str | None) -> list[str]:
    return [] if folder is None else folder.split("/")


@contextlib.contextmanager
def _opened(path: Path | RemoteFolder) -> Iterator[tuple[BinaryIO, int]]:
    """A tar file, and its size."""
    if isinstance(path, RemoteFolder):
        stream, size = open_stream(RemoteShard(RemoteFiles(path), path.url))
        with stream:
            yield stream, size
    else:
        with open(path, "rb") as file:
            yield file, os.path.getsize(path)


def _read_classes(file: Path | RemoteFolder) -> tuple[str, ...] | None:
    """The class names beside tar files; None where there are none."""
    try:
        content = read_whole(file) if isinstance(file, RemoteFolder) else file.read_bytes() if file.is_file() else None
        if content is None:
            return None
        classes = json.loads(decode_text(content, str(file)))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        classes = None
    require(
        isinstance(classes, list) and all(isinstance(name, str) for name in classes),
        f"{file} is no JSON list of class names: repair it, or remove it to have classes without names.",
    )
    require(len(set(classes)) == len(classes), f"{file} names a class twice: repair it.")
    return tuple(classes)
