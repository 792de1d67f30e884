"""What samples exist: where each image's bytes are, its size and its label, as compact arrays.

An index is a pure function of the folder: files are sorted by name, so every rank that scans it gets the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError
from megatron_nepa.data.headers import EXTENSIONS, UnreadableImageError, image_size


@dataclass(frozen=True)
class PackedNames:
    """Many strings as one byte array and the offsets between them: 1.3 million names are no Python objects."""

    text: npt.NDArray[np.uint8]  # UTF-8, back to back
    ends: npt.NDArray[np.int64]  # [n], where each ends in text

    @classmethod
    def pack(cls, names: Iterable[str]) -> PackedNames:
        """Pack ``names`` in their order."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.text[start : int(self.ends[i])].tobytes())


@dataclass(frozen=True)
class DatasetIndex:
    """The images of a data set, in a fixed order.

    Every array has one entry an image; a memory-mapped array serves as well as one in memory.
    """

    # folder that names and shards are relative to
    root: Path
    # path of each image's file below root, or its member's name in a shard
    names: PackedNames
    # stored size in pixels, EXIF orientation not applied
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    # class number, -1 where there is none
    label: npt.NDArray[np.int32]
    # class names, by number
    classes: tuple[str, ...] = ()
    # tar shards below root; empty where every image is its own file
    shards: tuple[str, ...] = ()
    # shard number, and the byte range of the image in it; [0] where every image is its own file
    shard: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    offset: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    size: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # what was left out, and why: (name, reason)
    quarantine: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, i: int) -> str:
        """Where image ``i`` is, for messages: its path, or shard path and member name."""
        if self.shards:
            return f"{self.root / self.shards[self.shard[i]]}:{self.names[i]}"
        return str(self.root / self.names[i])

    def fingerprint(self) -> str:
        """A hash of names, sizes and labels: equal indexes give equal runs, wherever their folder lies."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.names.text, self.names.ends, self.width, self.height, self.label):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def scan_folder(folder: str | Path) -> DatasetIndex:
    """Index an ImageFolder tree (one subfolder a class) or a flat folder of images, by reading every header.

    Args:
        folder: the tree or folder. Files are known as images by their extension; others are ignored.

    Returns:
        The index; labels follow the sorted class names, or are -1 in a flat folder. Images whose header is damaged or
        of an unsupported kind are in ``quarantine``.

    Raises:
        ConfigError: no such folder, no images in it, none readable, or images both beside and inside class folders.
    """
    root = Path(folder)
    names, labels, classes = list_images(root)
    rows: list[tuple[int, int, int]] = []
    kept: list[str] = []
    quarantine: list[tuple[str, str]] = []
    for name, label in zip(names, labels, strict=True):
        try:
            rows.append((*file_image_size(root / name), label))
            kept.append(name)
        except UnreadableImageError as error:
            quarantine.append((name, str(error)))
    if not rows:
        first, reason = quarantine[0]
        raise ConfigError(f"none of the {len(names)} image files in {root} can be read; the first, {first}: {reason}.")
    width, height, label = np.array(rows, np.int32).T.copy()
    return DatasetIndex(root, PackedNames.pack(kept), width, height, label, classes, quarantine=tuple(quarantine))


def file_image_size(path: Path) -> tuple[int, int]:
    """:func:`~megatron_nepa.data.headers.image_size` of a file."""
    try:
        with open(path, "rb") as file:
            # headers end within the first kilobytes; thumbnails and colour profiles can push one further back
            head = file.read(65536)
            try:
                return image_size(head)
            except UnreadableImageError:
                return image_size(head + file.read())
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error


def list_images(root: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Image files below ``root`` by extension, sorted: (paths relative to root, class numbers or -1, class names)."""
    if not root.is_dir():
        raise ConfigError(f"the data folder {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"the data folder {root} cannot be read: {error.strerror}.") from error
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    images = {folder: _walk(root, folder) for folder in folders}
    classes = tuple(folder for folder in folders if images[folder])
    if loose and classes:
        raise ConfigError(
            f"{root} holds {len(loose)} images beside class folders ({classes[0]}, ...): an ImageFolder tree keeps "
            "every image in a class folder and a flat folder has no subfolders with images; move one kind away."
        )
    if not loose and not classes:
        raise ConfigError(f"the data folder {root} holds no images ({', '.join(sorted(EXTENSIONS))}).")
    if loose:
        return loose, [-1] * len(loose), ()
    names = [name for folder in classes for name in images[folder]]
    labels = [number for number, folder in enumerate(classes) for _ in images[folder]]
    return names, labels, classes


def _walk(root: Path, folder: str) -> Sequence[str]:
    found = []
    for where, _, files in os.walk(root / folder, followlinks=True):
        relative = os.path.relpath(where, root)
        found += [os.path.join(relative, file) for file in files if _is_image(file)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
