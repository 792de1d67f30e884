"""Lists the images inside tar files, which stay as they are: an image is a range of bytes.

The tar format is read by Python's tarfile; WebDataset's own package streams shards in order, where a run looks
samples up by number.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import EXTENSIONS
from megatron_nepa.data.index.label_values import Label, Tally, decode_text, number_classes, read_label
from megatron_nepa.data.index.listing import Facts, Listed, Numbering, Source, kinds_of
from megatron_nepa.data.index.remote_shards import RemoteShard, open_stream, read_whole
from megatron_nepa.data.index.storage import shard_stamp
from megatron_nepa.data.index.walk import ARCHIVES, PassedOver, example, is_hidden, is_image
from megatron_nepa.data.remote.files import RemoteFiles
from megatron_nepa.data.remote.folder import RemoteFolder
from megatron_nepa.terminal import counted

CLASSES_FILE = "classes.json"  # beside tar shards: the class names, by number
_LABEL_FIELDS = ("cls", "cls.txt", "json")
_MOST_LINKS = 16  # that lead from one to the next


def sample_key(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, its path up to the first dot of the base name, and the field behind that dot."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


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
            _require_plain(name)

    def list(self, number: int) -> Listed:
        """The images of one tar file; what tells an image's class is its label, tar inside the tar and folder."""
        name = self.units[number]
        path = self.root / name
        stamp, found = shard_stamp(path), _Found()
        try:
            with _opened(path) as (file, size):
                _read_tar(file, str(path), 0, size, "", found)
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
        class_of = places.classes(self.root) if not by_label else None
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


@dataclass(frozen=True)
class _Member:
    """A file inside a tar file; an image's with its label."""

    name: str
    offset: int
    size: int
    group: str = ""  # name of the tar inside the tar
    label: Label = None

    @property
    def kind(self) -> tuple[Label, str, str | None]:
        """What may tell the class of an image: its label, tar inside the tar, and folder."""
        return self.label, self.group, posixpath.dirname(self.name) if "/" in self.name else None


@dataclass
class _Found:
    """What a tar file holds."""

    images: list[_Member] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    passed_over: PassedOver = field(default_factory=PassedOver)


def _read_tar(file: BinaryIO, path: str, start: int, end: int, group: str, found: _Found) -> None:
    """Append the images of the archive in bytes [start, end) of ``file``, and of the archives inside it."""
    labels = _Labels(path)
    images: dict[str, _Member] = {}
    for member in _wanted(file, path, start, end, found):
        extension = posixpath.splitext(member.name)[1].lower()
        if extension == ".tar":
            inner = group or posixpath.splitext(posixpath.basename(member.name))[0]
            _read_tar(file, f"{path}/{member.name}", member.offset, member.offset + member.size, inner, found)
        elif is_image(member.name):
            if images.pop(member.name, None) is not None:  # as tar itself: the last one counts
                found.passed_over.add("members that a later one of the same name replaces", member.name)
            images[member.name] = member
        else:
            file.seek(member.offset)
            labels.add(member.name, file.read(member.size))
    keys = [sample_key(name)[0] for name in images]
    found.counters["shared_keys"] += len(keys) - len(set(keys))
    found.images += [replace(image, group=group, label=labels.of(name)) for name, image in images.items()]
    found.counters["json_without_label"] += labels.empty
    found.counters["labels_without_image"] += labels.unused()


class _Labels:
    """The labels that the members of one tar file hold."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._of_key: dict[str, tuple[int | str, str]] = {}  # key -> label, member that holds it
        self._of_stem: dict[str, tuple[int | str, str]] = {}
        self._used: set[str] = set()  # members whose label is an image's
        self.empty = 0  # label files, which are JSON, without one

    def add(self, name: str, content: bytes) -> None:
        """Take note of a label file's content."""
        label = _label_in(name, content, f"{self._path}/{name}")
        if label is None:
            self.empty += name.lower().endswith(".json")
            return
        key, extension = sample_key(name)
        place, key = (self._of_key, key) if extension in _LABEL_FIELDS else (self._of_stem, _stem(name))
        known = place.setdefault(key, (label, name))
        self._agree(key, known, (label, name))

    def of(self, image: str) -> int | str | None:
        """The label of an image."""
        key = sample_key(image)[0]
        found = [known for known in (self._of_stem.get(_stem(image)), self._of_key.get(key)) if known is not None]
        if not found:
            return None
        self._agree(key, found[0], found[-1])
        self._used.update(member for _, member in found)
        return found[0][0]

    def unused(self) -> int:
        """Label files that no image of :meth:`of` had."""
        members = {member for place in (self._of_key, self._of_stem) for _, member in place.values()}
        return len(members - self._used)

    def _agree(self, key: str, one: tuple[int | str, str], other: tuple[int | str, str]) -> None:
        require(
            one[0] == other[0],
            f"{self._path} gives {key} two labels, {one[0]} in {one[1]} and {other[0]} in {other[1]}: give every image "
            "a key of its own.",
        )


def _stem(name: str) -> str:
    return name[: -len(".cls.txt")] if name.lower().endswith(".cls.txt") else posixpath.splitext(name)[0]


def _is_label(name: str) -> bool:
    return name.lower().endswith(tuple(f".{extension}" for extension in _LABEL_FIELDS))


def _label_in(name: str, content: bytes, where: str) -> int | str | None:
    """The label of a .cls file, or under "label" in a .json file; None where there is none."""
    if name.lower().endswith(".json"):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return None
        value = value.get("label") if isinstance(value, dict) else value
        text = "" if isinstance(value, bool) or not isinstance(value, (int, float, str)) else str(value)
    else:
        text = decode_text(content, where)
    text = text.strip()
    require("\n" not in text and "\r" not in text, f"{where} holds more than one line: a class file holds one label.")
    return read_label(text, where) if text else None


def _wanted(file: BinaryIO, path: str, start: int, end: int, found: _Found) -> list[_Member]:
    """Images, label files and archives, in their order, with links replaced by what they lead to."""
    wanted: list[_Member] = []
    links: dict[str, str] = {}
    for member in _members(file, path, start, end):
        name = posixpath.normpath(member.name)
        if member.isdir():
            continue
        if is_hidden(name):
            found.passed_over.add("hidden entries", name)
            continue
        if name.lower().endswith(ARCHIVES):
            _require_plain(f"{path}/{name}")
        elif not (is_image(name) or _is_label(name)):
            found.passed_over.add("files of other kinds", name)
            continue
        if member.issym() or member.islnk():
            folder = posixpath.dirname(name) if member.issym() else ""
            links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            wanted.append(_Member(name, -1, 0))
        elif not member.isfile():
            found.passed_over.add("entries that are neither file nor folder", name)
        elif member.issparse():
            raise ConfigError(f"{path} holds {name} as a sparse file, which cannot be read in place: pack it again.")
        else:
            wanted.append(_Member(name, member.offset_data, member.size))
    return _resolved(file, path, start, end, wanted, links) if links else wanted


def _resolved(
    file: BinaryIO, path: str, start: int, end: int, wanted: list[_Member], links: dict[str, str]
) -> list[_Member]:
    files = {
        posixpath.normpath(member.name): member
        for member in _members(file, path, start, end)
        if member.isfile() and not member.issparse()
    }
    resolved = []
    for member in wanted:
        target = member.name
        for _ in range(_MOST_LINKS if member.offset < 0 else 0):
            target = links.get(target, target)
        if member.offset < 0:
            require(
                target in files and target not in links,
                f"{path} holds {member.name} as a link to {links[member.name]}, which it does not hold: pack it again "
                "with --dereference.",
            )
            member = _Member(member.name, files[target].offset_data, files[target].size)
        resolved.append(member)
    return resolved


def _members(file: BinaryIO, path: str, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Every member of the archive in bytes [start, end) of ``file``.

    Raises:
        ConfigError: it is damaged or cut short.
    """
    count = 0
    try:
        file.seek(start)
        archive = tarfile.TarFile(fileobj=file)
        before = start - 1
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # a million TarInfo objects would stay in memory
            whole = member.size >= 0 and member.offset_data + member.size <= end and archive.offset > before
            if not whole:
                raise tarfile.ReadError("cut short")
            before = archive.offset
            yield member
            count += 1
        # tarfile ends in silence at damage behind the first header: only a block of zeros marks the true end
        file.seek(archive.offset)
        block = file.read(max(0, min(512, end - archive.offset)))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path} is cut short or damaged behind its first {count} members ({error}): get it again, or move it away."
        ) from error
    require(
        len(block) == 512 and not any(block),
        f"{path} ends without the mark of a tar file's end behind its first {count} members, so it may be cut short: "
        "get it again, or move it away; if it is known to be whole, append the mark (head -c 1024 /dev/zero).",
    )


def _require_plain(path: str) -> None:
    require(
        path.lower().endswith(".tar"),
        f"{path} is no plain tar file: images are read from tar files in place, so unpack it, or move it away.",
    )


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
