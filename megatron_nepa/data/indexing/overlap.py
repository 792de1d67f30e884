"""Which images two sets share, byte for byte: a training set that holds validation images makes those worthless.

Sizes are compared first, then hashes of the first bytes, and where those agree too, of the whole images. Of the smaller
set a few numbers an image are kept in memory; the larger one is passed over once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.terminal import percent

_HEAD = 4096  # bytes that are hashed of every image whose size the other set has too
_CHUNK = 1024  # images of a task
_AT_ONCE = 256  # chunks
_EXAMPLES = 3

T = TypeVar("T")

Rows = npt.NDArray[np.int64]


@dataclass
class Overlap:
    """What two sets share.

    Attributes:
        first: images of the first set that the second one has.
        second: images of the second set that the first one has.
        examples: a few of them, where each is in the first set and in the second.
        unreadable: images of either set that could not be read, and so were not compared.
    """

    first: int = 0
    second: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    unreadable: int = 0

    def describe(self, first: str, second: str, images: int) -> str:
        """The result in a sentence.

        Args:
            first: name of the first set.
            second: of the second one.
            images: that this one has.
        """
        unread = f" ({self.unreadable:,} images could not be read)" if self.unreadable else ""
        if not self.second:
            return f"{first} and {second} share no image byte for byte{unread}."
        shown = "; ".join(f"{there} is {here}" for here, there in self.examples)
        return (
            f"{self.second:,} of the {images:,} images of {second} ({percent(self.second / images)}) are in {first} "
            f"too, byte for byte, as {self.first:,} of its images{unread}: {shown}"
            + (", ..." if self.second > len(self.examples) else ".")
        )


def find_overlap(
    first: DatasetIndex, second: DatasetIndex, workers: int | None = None, progress: bool = True
) -> Overlap:
    """Compare the images of two sets.

    Args:
        first: one set, whose images' sizes in pixels need not be known.
        second: the other.
        workers: threads that read; None takes two a core.
        progress: show a progress bar.

    Raises:
        ConfigError: a shard was replaced since it was indexed.
    """
    small, large = (first, second) if len(first) < len(second) else (second, first)
    overlap = Overlap()
    with (
        ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool,
        tqdm(total=len(small) + len(large), unit=" images", disable=not progress) as bar,
    ):
        known = _Known(small)
        for rows, unreadable in _in_chunks(pool, known.add, len(small)):
            overlap.unreadable += unreadable
            bar.update(rows)
        known.sort()
        for rows, pairs, unreadable in _in_chunks(pool, _Search(known, large), len(large)):
            overlap.unreadable += unreadable
            found = {row for row, _ in pairs}
            overlap.first += len(found)  # of the larger set, for now
            for row, other in pairs:
                known.shared[other] = True
                if len(overlap.examples) < _EXAMPLES and row in found:
                    found.remove(row)
                    overlap.examples.append((large.where(row), small.where(other)))
            bar.update(rows)
    overlap.second = int(known.shared.sum())
    if small is first:
        overlap.first, overlap.second = overlap.second, overlap.first
        overlap.examples = [(here, there) for there, here in overlap.examples]
    return overlap


class _Known:
    """What is kept of the smaller set: of each image its size, a hash of its beginning and, once needed, of all."""

    def __init__(self, index: DatasetIndex) -> None:
        self._index, self._store, images = index, ImageStore(index), len(index)
        self._size = np.full(images, -1, np.int64)
        self._head = np.zeros(images, np.uint64)
        self._whole = np.zeros((images, 16), np.uint8)
        self._has_whole = np.zeros(images, np.bool_)
        self.shared = np.zeros(images, np.bool_)

    def add(self, rows: Rows) -> tuple[int, int]:
        """Read some images; how many they were, and how many could not be read."""
        self._size[rows], unreadable = _sizes(self._index, rows)
        for row in rows[self._size[rows] >= 0].tolist():
            try:
                self._head[row] = _head(self._store, row)
            except UnreadableImageError:
                self._size[row] = -1
                unreadable += 1
        return len(rows), unreadable

    def sort(self) -> None:
        """Once all are added: get ready to be asked."""
        self._by_head = np.argsort(self._head, kind="stable")
        self._heads = self._head[self._by_head]
        self._sizes = np.unique(self._size[self._size >= 0])

    def have_size(self, sizes: Rows) -> npt.NDArray[np.bool_]:
        """Of each size whether an image has it."""
        place = np.minimum(np.searchsorted(self._sizes, sizes), max(0, len(self._sizes) - 1))
        return (self._sizes[place] == sizes) if len(self._sizes) else np.zeros(len(sizes), np.bool_)

    def with_head(self, head: int, size: int) -> list[int]:
        """The images that begin so and have that size."""
        low, high = (int(np.searchsorted(self._heads, np.uint64(head), side)) for side in ("left", "right"))
        return [row for row in self._by_head[low:high].tolist() if self._size[row] == size]

    def whole(self, row: int) -> bytes:
        """The hash of an image."""
        if not self._has_whole[row]:  # of two threads that come here each finds the same
            self._whole[row] = np.frombuffer(_whole(self._store, row), np.uint8)
            self._has_whole[row] = True
        return self._whole[row].tobytes()


class _Search:
    """Looks for images of the larger set among those of the smaller one."""

    def __init__(self, known: _Known, index: DatasetIndex) -> None:
        self._known, self._index, self._store = known, index, ImageStore(index)

    def __call__(self, rows: Rows) -> tuple[int, list[tuple[int, int]], int]:
        """How many images these were, the pairs of equal ones, and how many images could not be read."""
        sizes, unreadable = _sizes(self._index, rows)
        pairs = []
        candidates = self._known.have_size(sizes)
        for row, size in zip(rows[candidates].tolist(), sizes[candidates].tolist(), strict=True):
            try:
                similar = self._known.with_head(_head(self._store, row), size)
                digest = _whole(self._store, row) if similar else b""
                pairs += [(row, other) for other in similar if self._known.whole(other) == digest]
            except UnreadableImageError:
                unreadable += 1
        return len(rows), pairs, unreadable


def _in_chunks(pool: ThreadPoolExecutor, call: Callable[[Rows], T], images: int) -> Iterator[T]:
    """What ``call`` gives for all rows, a chunk after the other; some chunks are under way, the others not begun."""
    starts = range(0, images, _CHUNK)
    for under_way in range(0, len(starts), _AT_ONCE):
        chunks = [np.arange(start, min(start + _CHUNK, images)) for start in starts[under_way : under_way + _AT_ONCE]]
        yield from pool.map(call, chunks)


def _sizes(index: DatasetIndex, rows: Rows) -> tuple[Rows, int]:
    """Bytes of each image, -1 of those that are not there, and how many these are."""
    if index.shards:
        return np.asarray(index.size[rows]).astype(np.int64), 0
    sizes = np.full(len(rows), -1, np.int64)
    for i, row in enumerate(rows.tolist()):
        try:
            sizes[i] = os.stat(str(index.root / index.names[row])).st_size
        except OSError:
            continue
    return sizes, int((sizes < 0).sum())


def _head(store: ImageStore, row: int) -> int:
    return int.from_bytes(hashlib.blake2b(store.read(row, at_most=_HEAD).data, digest_size=8).digest(), "little")


def _whole(store: ImageStore, row: int) -> bytes:
    return hashlib.blake2b(store.read(row).data, digest_size=16).digest()
