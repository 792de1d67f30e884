"""Several sets that one run draws from, each by its share.

A mixture is asked like an index: its images are numbered through, those of the first source first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.index.dataset_index import DatasetIndex

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """One set of a mixture.

    Attributes:
        name: short, and unlike those of the other sources.
        index: its images.
        per_block: how many samples of a block are its.
        drawn: samples of it that the run had drawn where the mixture began.
    """

    name: str
    index: DatasetIndex
    per_block: int
    drawn: int = 0


@dataclass(frozen=True)
class Column:
    """One array of several sources, an entry an image of the mixture."""

    parts: tuple[npt.NDArray[np.integer[Any]], ...]
    starts: IntArray  # number of each part's first image

    def __getitem__(self, images: IntArray) -> IntArray:
        images = np.asarray(images)
        source = np.searchsorted(self.starts, images, "right") - 1
        values = np.empty(images.shape, np.int64)
        for number in np.unique(source):
            rows = source == number
            values[rows] = self.parts[number][images[rows] - self.starts[number]]
        return values


@dataclass(frozen=True)
class Mixture:
    """Several sets and their shares.

    Attributes:
        sources: two or more.
        since: sample of the run that the mixture begins at: one whose shares were changed goes on from there.
    """

    sources: tuple[Source, ...]
    since: int = 0

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def is_remote(self) -> bool:
        """Whether images of any source lie behind URLs."""
        return any(source.index.is_remote for source in self.sources)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each source."""
        return tuple(len(source.index) for source in self.sources)

    @cached_property
    def starts(self) -> IntArray:
        """Number of each source's first image, int64 [sources]."""
        return np.cumsum((0, *self.sizes[:-1]))

    @property
    def width(self) -> Column:
        """Stored width of each image."""
        return Column(tuple(source.index.width for source in self.sources), self.starts)

    @property
    def height(self) -> Column:
        """Stored height of each image."""
        return Column(tuple(source.index.height for source in self.sources), self.starts)

    def locate(self, image: int) -> tuple[int, int]:
        """The number of an image's source, and of the image in it."""
        source = int(np.searchsorted(self.starts, image, "right")) - 1
        return source, image - int(self.starts[source])

    def where(self, image: int) -> str:
        """Where an image is, for messages."""
        source, row = self.locate(image)
        return self.sources[source].index.where(row)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """What tells each source from the others whatever its name: the fingerprint, and a number where two have it."""
        prints = [source.index.fingerprint() for source in self.sources]
        return tuple(f"{one}/{prints[:i].count(one)}" for i, one in enumerate(prints))

    def fingerprint(self) -> dict[str, str]:
        """Of every source by its name, what must be equal for two runs to draw the same samples."""
        return {source.name: f"{key}: {source.per_block}" for source, key in zip(self.sources, self.keys, strict=True)}


def sets_of(index: DatasetIndex | Mixture) -> list[DatasetIndex]:
    """The sets of a mixture; a set itself."""
    return [source.index for source in index.sources] if isinstance(index, Mixture) else [index]


def source_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of paths that tell them apart: of a/train.index and b/val.index the last parts."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(paths)
