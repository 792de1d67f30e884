"""What is finished of an index in the making: a file for each unit listed, and for each chunk of images checked.

A file is written beside its place and renamed, so it is whole or absent; safetensors is read in slices, so a unit of
millions of images is never held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames, Stamp
from megatron_nepa.data.index.listing import Facts, Listed, Source
from megatron_nepa.data.indexing.verify import Checked, Chunk
from megatron_nepa.data.remote.folder import RemoteFolder
from megatron_nepa.files import whole_or_absent

_COLUMNS = ("label", "shard", "offset", "size", "mask_offset", "mask_size")
_NAMES = ("names", "masks")
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}


class Parts:
    """The files of an index in the making.

    Args:
        folder: where they lie.
        root: of the data.
        length: images of a chunk.
    """

    def __init__(self, folder: Path, root: Path | RemoteFolder, length: int) -> None:
        self.folder, self._root, self._length = folder, root, length

    def is_listed(self, source: Source, unit: int) -> bool:
        """Whether a unit is listed, and still is what it was; what was found of it before is removed otherwise."""
        path = self._listing(unit)
        try:
            if path.is_file() and source.is_current(unit, ListedPart(path, self._root).slice()):
                return True
        except SafetensorError:  # cut short: the machine went down, and its disk lost what it had taken
            pass
        for file in self.folder.glob(f"{unit:06d}_*"):
            file.unlink()
        path.unlink(missing_ok=True)
        return False

    def save_listing(self, unit: int, listed: Listed) -> None:
        """Keep the images of a unit."""
        images = listed.images
        arrays = {name: getattr(images, name) for name in _COLUMNS}
        for name in _NAMES:
            packed: PackedNames = getattr(images, name)
            arrays |= {name: packed.text, f"{name}_ends": packed.ends}
        metadata = {
            "facts": listed.facts.to_json(),
            "shards": json.dumps(list(images.shards)),
            "stamps": json.dumps(list(images.stamps)),
            "quarantine": json.dumps(list(images.quarantine)),
        }
        _save(self._listing(unit), arrays, metadata)

    def listing(self, unit: int) -> ListedPart:
        """What :meth:`save_listing` kept."""
        return ListedPart(self._listing(unit), self._root)

    def chunks(self, unit: int) -> Iterator[range]:
        """The rows of each chunk of a unit."""
        count = len(self.listing(unit))
        return (range(start, min(start + self._length, count)) for start in range(0, count, self._length))

    def unchecked(self, unit: int) -> Iterator[Chunk]:
        """The chunks of a unit that were not checked yet."""
        listing = self.listing(unit)
        for rows in self.chunks(unit):
            if not self.is_checked(unit, rows):
                yield Chunk(unit, np.arange(rows.start, rows.stop), listing.slice(rows.start, rows.stop))

    def is_checked(self, unit: int, rows: range) -> bool:
        """Whether a chunk was checked."""
        path = self._checked(unit, rows.start)
        try:
            if path.is_file():
                with safe_open(path, framework="numpy"):
                    return True
        except SafetensorError:
            path.unlink()
        return False

    def save_checked(self, unit: int, checked: Checked) -> None:
        """Keep what was found about a chunk."""
        arrays = {"width": checked.width, "height": checked.height}
        _save(self._checked(unit, int(checked.rows[0])), arrays, {"reasons": json.dumps(checked.reasons)})

    def checked(self, unit: int, rows: range) -> Checked:
        """What :meth:`save_checked` kept."""
        with safe_open(self._checked(unit, rows.start), framework="numpy") as file:
            reasons = {int(row): reason for row, reason in json.loads(file.metadata()["reasons"]).items()}
            return Checked(
                np.arange(rows.start, rows.stop), file.get_tensor("width"), file.get_tensor("height"), reasons
            )

    def _listing(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.safetensors"

    def _checked(self, unit: int, start: int) -> Path:
        return self.folder / f"{unit:06d}_{start:09d}.safetensors"


class ListedPart:
    """The images of one unit on disk."""

    def __init__(self, path: Path, root: Path | RemoteFolder) -> None:
        self._path, self._root = path, root
        with safe_open(path, framework="numpy") as file:
            self._metadata: dict[str, str] = file.metadata()
            (self._length,) = file.get_slice("names_ends").get_shape()

    def __len__(self) -> int:
        return self._length

    @property
    def facts(self) -> Facts:
        """What they tell about the set."""
        return Facts.from_json(self._metadata["facts"])

    @property
    def quarantine(self) -> list[tuple[str, str]]:
        """What was left out when they were listed, and why."""
        return [(name, reason) for name, reason in json.loads(self._metadata["quarantine"])]

    @cached_property
    def _shards(self) -> tuple[str, ...]:  # of labels from a file, those of the whole set
        return tuple(json.loads(self._metadata["shards"]))

    @cached_property
    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(Stamp(*stamp) for stamp in json.loads(self._metadata["stamps"]))

    def slice(self, start: int = 0, stop: int | None = None) -> DatasetIndex:
        """Some of the images, by default all, without what was left out."""
        stop = self._length if stop is None else stop
        with safe_open(self._path, framework="numpy") as file:
            columns: dict[str, Any] = {name: _range(file, name, start, stop) for name in _COLUMNS}
            columns |= {name: _names(file, name, start, stop) for name in _NAMES}
        unknown = np.zeros(stop - start, np.int32)
        return DatasetIndex(
            self._root,
            width=unknown,
            height=unknown,
            shards=self._shards,
            stamps=self._stamps,
            **columns,
        )


def _range(file: Any, name: str, start: int, stop: int) -> npt.NDArray[Any]:
    """A part of an array, or of one without entries nothing."""
    whole = file.get_slice(name)
    (length,) = whole.get_shape()
    part: npt.NDArray[Any] = whole[start:stop] if start < min(stop, length) else np.zeros(0, _TYPES[whole.get_dtype()])
    return part


def _names(file: Any, name: str, start: int, stop: int) -> PackedNames:
    ends = _range(file, f"{name}_ends", max(0, start - 1), stop)
    begin, ends = (int(ends[0]), ends[1:]) if start and len(ends) else (0, ends)
    return PackedNames(_range(file, name, begin, int(ends[-1]) if len(ends) else begin), ends - begin)


def _save(path: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    with whole_or_absent(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, metadata)
