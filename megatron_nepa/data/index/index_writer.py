"""Writes the files of an index piece by piece, so that memory does not grow with the number of images."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames, PackedStamps
from megatron_nepa.data.index.storage import shard_stamp
from megatron_nepa.data.remote.folder import RemoteFolder

VERSION = 2  # version 1 kept shards, stamps and what was left out in the JSON file
JSON_FILE = "index.json"
COLUMNS: dict[str, type[np.integer[Any]]] = {
    **dict.fromkeys(("width", "height", "label", "shard"), np.int32),
    **dict.fromkeys(("offset", "size"), np.int64),
}
MASK_COLUMNS = ("mask_offset", "mask_size")  # written where masks lie in shards
NAMES = ("names", "masks", "shards", "stamps", "left_out", "reasons")
LABELS_FILE = "found_labels.npy"
_BLOCK = 1 << 20  # bytes that are read at once
_HASHED = ("names", "names_ends", "width", "height", "label")  # as DatasetIndex.fingerprint has them


class IndexWriter:
    """The files of an index that grows.

    Args:
        folder: where they are written; made, and absent before.

    Attributes:
        first_left_out: the first name and reason of :meth:`leave_out`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._columns = {name: _Column(folder / f"{name}.npy", kind) for name, kind in COLUMNS.items()}
        self._names = {name: _Names(folder, name) for name in NAMES}
        self._labels = np.zeros(0, np.int32)
        self.first_left_out: tuple[str, str] | None = None

    def add_shards(self, images: DatasetIndex) -> int:
        """Add the shards that images lie in; those without stamps are stamped as they are now.

        Returns:
            The number of the first.
        """
        first = len(self._names["shards"])
        stamps = images.stamps or [shard_stamp(images.root / shard) for shard in images.shards]
        self._names["shards"].append(PackedNames.pack(images.shards))
        self._names["stamps"].append(PackedStamps.pack(stamps).text)
        return first

    def append(self, images: DatasetIndex, first_shard: int) -> None:
        """Add images.

        Args:
            images: their shards are numbered from 0.
            first_shard: number of the first of them, from :meth:`add_shards`.
        """
        for name in COLUMNS:
            values = getattr(images, name)
            self._columns[name].append(values + first_shard if name == "shard" else values)
        if len(images.mask_offset):
            for name in MASK_COLUMNS:
                if name not in self._columns:
                    self._columns[name] = _Column(self._folder / f"{name}.npy", np.int64)
                self._columns[name].append(getattr(images, name))
        self._names["names"].append(images.names)
        self._names["masks"].append(images.masks)
        self._labels = np.union1d(self._labels, images.label).astype(np.int32)

    def leave_out(self, reasons: Iterable[tuple[str, str]]) -> None:
        """Note what cannot be used, and why."""
        reasons = list(reasons)
        self.first_left_out = self.first_left_out or next(iter(reasons), None)
        for name, part in (("left_out", 0), ("reasons", 1)):
            self._names[name].append(PackedNames.pack(pair[part] for pair in reasons))

    def __len__(self) -> int:
        return len(self._names["names"])

    def finish(self, root: str, classes: tuple[str, ...]) -> None:
        """Complete the files.

        Args:
            root: folder that names and shards are relative to; from the index's own folder on where it is no absolute
                path.
            classes: class names, by number.
        """
        for column in self._columns.values():
            column.close()
        for names in self._names.values():
            names.close()
        np.save(self._folder / LABELS_FILE, self._labels)
        facts = {
            "version": VERSION,
            "images": len(self),
            "root": root,
            "classes": classes,
            "fingerprint": self._fingerprint(),
            "arrays": {file.name: file.stat().st_size for file in sorted(self._folder.iterdir())},
        }
        (self._folder / JSON_FILE).write_text(json.dumps(facts, indent=1))

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in _HASHED:
            with open(self._folder / f"{name}.npy", "rb") as file:
                file.seek(len(_header(np.dtype(np.uint8), 0)))
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()


class _Column:
    """One array of a file that grows."""

    def __init__(self, file: Path, kind: type[np.integer[Any]]) -> None:
        self._dtype, self._length = np.dtype(kind), 0
        self._file = open(file, "wb")  # noqa: SIM115  # closed by close
        self._file.write(_header(self._dtype, 0))

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self._dtype, self._length))
        self._file.close()


class _Names:
    """Packed names in two files that grow."""

    def __init__(self, folder: Path, name: str) -> None:
        self._text = _Column(folder / f"{name}.npy", np.uint8)
        self._ends = _Column(folder / f"{name}_ends.npy", np.int64)

    def append(self, names: PackedNames) -> None:
        self._ends.append(np.asarray(names.ends) + len(self._text))
        self._text.append(names.text)

    def __len__(self) -> int:
        return len(self._ends)

    def close(self) -> None:
        self._text.close()
        self._ends.close()


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """What np.save writes in front of an array; numpy leaves room in it for the length to grow."""
    header = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue()


def root_in_index(root: Path | RemoteFolder, index: Path) -> str:
    """How an index remembers its root: from its own folder on where the root lies below that, so both can be moved."""
    if isinstance(root, RemoteFolder):
        return root.url
    home = index.parent.resolve()
    found = root.resolve()
    return os.path.relpath(found, home) if found.is_relative_to(home) else str(found)
