"""What samples exist: where each image's bytes are, its size and its label, as compact arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.remote.folder import RemoteFolder

_EDGE_BYTES = 4096  # at each end of a shard


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

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def select(self, rows: npt.NDArray[np.int64]) -> PackedNames:
        """The names at ``rows``, in that order."""
        rows = np.asarray(rows)
        stop = np.asarray(self.ends[rows])
        start = np.where(rows > 0, np.asarray(self.ends[rows - 1]) if len(self) else stop, 0)
        ends = np.cumsum(stop - start)
        # of every byte of the result, its place in the text
        place = np.repeat(stop - ends, stop - start) + np.arange(ends[-1] if len(ends) else 0)
        return PackedNames(np.asarray(self.text[place]), ends)

    @classmethod
    def join(cls, parts: Sequence[PackedNames]) -> PackedNames:
        """The names of several, one behind the other."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])
        ends = [np.asarray(part.ends) + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.text for part in parts]), np.concatenate(ends))

    def slice(self, start: int, stop: int) -> PackedNames:
        """The names from number ``start`` to ``stop``."""
        begin = int(self.ends[start - 1]) if start else 0
        ends = np.asarray(self.ends[start:stop])
        return PackedNames(np.asarray(self.text[begin : int(ends[-1]) if len(ends) else begin]), ends - begin)


def edges_of(read: Callable[[int, int], bytes], size: int) -> str:
    """The hash of a shard's first and last bytes that its stamp holds: they tell it from another of its size.

    Args:
        read: some bytes of it, from an offset on.
        size: its bytes.
    """
    few = min(size, _EDGE_BYTES)
    edges = hashlib.blake2b(digest_size=16)
    for offset in (0, size - few):
        edges.update(read(offset, few) if few else b"")
    return edges.hexdigest()


class Stamp(NamedTuple):
    """What a shard was when it was indexed, as far as it can be told at once."""

    size: int
    # of the last change, nanoseconds since 1970, or of a remote shard a hash of its version; a copy has another
    time: int
    # hash of the first and last bytes
    edges: str


@dataclass(frozen=True)
class PackedStamps:
    """The stamps of many shards, each as JSON text, of which one is read when it is asked for."""

    text: PackedNames

    @classmethod
    def pack(cls, stamps: Iterable[Stamp]) -> PackedStamps:
        """Pack ``stamps`` in their order."""
        return cls(PackedNames.pack(json.dumps(stamp) for stamp in stamps))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, i: int) -> Stamp:
        return Stamp(*json.loads(self.text[i]))

    def __iter__(self) -> Iterator[Stamp]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class PackedReasons:
    """What was left out of a set, and why: pairs (name, reason)."""

    names: PackedNames
    reasons: PackedNames

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, str]:
        return self.names[i], self.reasons[i]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self.names, self.reasons, strict=True)


@dataclass(frozen=True)
class DatasetIndex:
    """The images of a data set, in a fixed order.

    Every array has one entry an image; a memory-mapped array serves as well as one in memory.
    """

    # folder that names and shards are relative to; a remote one holds shards alone
    root: Path | RemoteFolder
    # path of each image's file below root, or its member's name in a shard
    names: PackedNames
    # stored size in pixels, EXIF orientation not applied
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    # class number, -1 where there is none
    label: npt.NDArray[np.int32]
    # class names, by number
    classes: tuple[str, ...] = ()
    # tar, Arrow or parquet files below root that hold the images; empty where every image is its own file
    shards: Sequence[str] | PackedNames = ()
    # shard number, and the byte range of the image in it; [0] where every image is its own file
    shard: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    offset: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    size: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # path of each image's segmentation mask below root; empty where there are none
    masks: PackedNames = field(default_factory=lambda: PackedNames.pack(()))
    # the byte range of the mask in the image's shard; [0] where masks are files
    mask_offset: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    mask_size: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # what was left out, and why: (name, reason)
    quarantine: Sequence[tuple[str, str]] | PackedReasons = ()
    # of each shard when it was indexed; empty where that was not recorded
    stamps: Sequence[Stamp] | PackedStamps = ()
    # what was computed of all rows when the index was written; "" and None where it has to be
    recorded_fingerprint: str = ""
    recorded_labels: npt.NDArray[np.int32] | None = None
    # what was passed over, or taken to mean, when the images were listed: for the user to read, not kept on disk
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_remote(self) -> bool:
        """Whether its bytes lie behind URLs."""
        return isinstance(self.root, RemoteFolder)

    @property
    def folder(self) -> Path:
        """The root of an index whose files lie here."""
        assert isinstance(self.root, Path)
        return self.root

    @property
    def num_classes(self) -> int:
        """Classes by name, or else the numbers from 0 to the largest label; 0 where no image has one."""
        return len(self.classes) or int(self.found_labels.max(initial=-1)) + 1

    @property
    def found_labels(self) -> npt.NDArray[np.int32]:
        """The labels that occur, sorted, each once; -1 first where an image has none."""
        return np.unique(self.label) if self.recorded_labels is None else self.recorded_labels

    def where(self, i: int) -> str:
        """Where image ``i`` is, for messages: its path, or shard path and member name."""
        if self.shards:
            return f"{self.root / self.shards[self.shard[i]]}:{self.names[i]}"
        return str(self.root / self.names[i])

    def select(self, rows: npt.NDArray[np.int64]) -> DatasetIndex:
        """The images at ``rows``, in that order; classes, shards and quarantine stay whole."""
        return self._of(lambda values: values[rows], lambda names: names.select(rows))

    def slice(self, start: int, stop: int) -> DatasetIndex:
        """The images from number ``start`` to ``stop``, as :meth:`select` gives them."""
        return self._of(lambda values: values[start:stop], lambda names: names.slice(start, stop))

    def _of(
        self,
        pick: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
        pick_names: Callable[[PackedNames], PackedNames],
    ) -> DatasetIndex:
        """Some of the images; what none has stays empty."""
        columns = ("width", "height", "label", "shard", "offset", "size", "mask_offset", "mask_size")
        arrays = {name: getattr(self, name) for name in columns}
        names: dict[str, PackedNames] = {"names": self.names, "masks": self.masks}
        picked: dict[str, Any] = {
            **{name: np.asarray(pick(array)) for name, array in arrays.items() if len(array) == len(self)},
            **{name: pick_names(packed) for name, packed in names.items() if len(packed) == len(self)},
        }
        return replace(self, recorded_fingerprint="", recorded_labels=None, **picked)

    def fingerprint(self) -> str:
        """A hash of names, sizes and labels: equal indexes give equal runs, wherever their folder lies."""
        if self.recorded_fingerprint:
            return self.recorded_fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.names.text, self.names.ends, self.width, self.height, self.label):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
