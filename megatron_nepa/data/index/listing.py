"""A data set that is listed unit by unit, a shard or a class folder, so that no process holds more of it than one.

What a unit tells about the whole set, the kinds of labels in it above all, is told in a few facts: classes are numbered
from the facts of all units.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.storage import is_as_stamped
from megatron_nepa.data.index.walk import PassedOver
from megatron_nepa.data.remote.folder import RemoteFolder


class Kind(NamedTuple):
    """What tells the class of some images of a unit: a label, or a folder."""

    what: tuple[Any, ...]  # of strings, numbers and None
    images: int
    first: str  # which image it is of first, for messages


@dataclass(frozen=True)
class Facts:
    """What the images of one unit tell about the set; each value goes through JSON.

    Attributes:
        images: that were listed, those that turned out to be empty too.
        kinds: in the order of their first images; a listed image's label is its kind's number. None where labels are
            class numbers already.
        passed_over: what the unit holds besides.
        counters: what the user is told the sum of.
    """

    images: int
    kinds: tuple[Kind, ...] | None = None
    passed_over: PassedOver = field(default_factory=PassedOver)
    counters: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """The facts as text."""
        return json.dumps([self.images, self.kinds, self.passed_over.found, self.counters])

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """The facts that :meth:`to_json` wrote."""
        images, kinds, passed_over, counters = json.loads(text)
        if kinds is not None:
            kinds = tuple(Kind(tuple(what), count, first) for what, count, first in kinds)
        found = {kind: (count, first) for kind, (count, first) in passed_over.items()}
        return cls(images, kinds, PassedOver(found), counters)


def kinds_of(
    whats: Iterable[tuple[Any, ...]], first: Callable[[int], str]
) -> tuple[npt.NDArray[np.int32], tuple[Kind, ...]]:
    """The kinds of the images of a unit.

    Args:
        whats: what tells the class of each image.
        first: of the number of an image, which it is, for messages.

    Returns:
        The number of each image's kind, and the kinds in the order of their first images.
    """
    number: dict[tuple[Any, ...], int] = {}
    of_image = np.array([number.setdefault(what, len(number)) for what in whats], np.int32)
    _, firsts, counts = np.unique(of_image, return_index=True, return_counts=True)
    kinds = zip(number, counts.tolist(), firsts.tolist(), strict=True)
    return of_image, tuple(Kind(what, count, first(i)) for what, count, i in kinds)


@dataclass(frozen=True)
class Listed:
    """One unit: its images, their sizes not known yet (0), and its facts."""

    images: DatasetIndex
    facts: Facts


@dataclass(frozen=True)
class Numbering:
    """The classes of a set.

    Attributes:
        classes: names, by number.
        notes: what the user should know.
        number: class number of what a kind says, -1 for none.
    """

    classes: tuple[str, ...]
    notes: tuple[str, ...]
    number: Callable[[tuple[Any, ...]], int] = lambda what: -1

    def numbered(self, images: DatasetIndex, facts: Facts) -> DatasetIndex:
        """Listed images with class numbers for labels."""
        if facts.kinds is None:
            return images
        numbers = np.array([self.number(kind.what) for kind in facts.kinds], np.int32)
        return replace(images, label=numbers[images.label])


class Source(ABC):
    """A data set whose images are not listed yet.

    Attributes:
        root: folder that names and shards are relative to.
        units: its parts, in the order of their images.
        unit: what they are, for a progress bar.
        has_masks: whether these are pairs of image and mask.
    """

    root: Path | RemoteFolder
    units: Sequence[str]
    unit = "shards"
    has_masks = False

    @abstractmethod
    def list(self, number: int) -> Listed:
        """The images of one unit.

        Raises:
            ConfigError: it is damaged, cannot be read, or contradicts itself.
        """

    @abstractmethod
    def number(self, facts: Iterable[Facts]) -> Numbering:
        """The classes of the set.

        Args:
            facts: of every unit, in their order.

        Raises:
            ConfigError: no images, or labels that contradict each other.
        """

    def is_current(self, number: int, images: DatasetIndex) -> bool:
        """Whether a unit still is what ``images`` were listed from."""
        stamped = zip(images.shards, images.stamps, strict=True)
        return all(is_as_stamped(images.root / shard, stamp) for shard, stamp in stamped)

    def identity(self) -> str:
        """A hash of what is to be listed, as far as it is known before."""
        # names may be no UTF-8
        text = f"{self.root.resolve()} {'/'.join(self.units)}".encode(errors="surrogateescape")
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def listing(self) -> DatasetIndex:
        """The images of all units, in memory."""
        units = [self.list(number) for number in range(len(self.units))]
        numbering = self.number(unit.facts for unit in units)
        return joined([numbering.numbered(unit.images, unit.facts) for unit in units], numbering)


class Known(Source):
    """Images that are listed already."""

    def __init__(self, listing: DatasetIndex) -> None:
        self._listing = listing
        self.root, self.units, self.has_masks = listing.root, ("",), len(listing.masks) > 0

    def list(self, number: int) -> Listed:
        """All of them."""
        return Listed(self._listing, Facts(len(self._listing)))

    def number(self, facts: Iterable[Facts]) -> Numbering:
        """The classes that the listing has."""
        return Numbering(self._listing.classes, self._listing.notes)

    def is_current(self, number: int, images: DatasetIndex) -> bool:
        """As :meth:`identity` says."""
        return True

    def identity(self) -> str:
        """A hash of the listing."""
        listing = self._listing
        text = f"{self.root.resolve()} {tuple(listing.shards)}".encode(errors="surrogateescape")
        digest = hashlib.blake2b(text, digest_size=16)
        for array in (listing.names.text, listing.names.ends, listing.label, listing.offset, listing.masks.text):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def listing(self) -> DatasetIndex:
        """The listing itself."""
        return self._listing


def joined(parts: Sequence[DatasetIndex], numbering: Numbering) -> DatasetIndex:
    """One listing of several, whose shards are numbered one behind the other."""
    first_shard = np.cumsum([0, *(len(part.shards) for part in parts)])
    columns = ("width", "height", "label", "offset", "size", "mask_offset", "mask_size")
    picked: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
    shard = [part.shard + start for part, start in zip(parts, first_shard, strict=False)]
    return replace(
        parts[0],
        names=PackedNames.join([part.names for part in parts]),
        masks=PackedNames.join([part.masks for part in parts]),
        shards=tuple(name for part in parts for name in part.shards),
        stamps=tuple(stamp for part in parts for stamp in part.stamps),
        shard=np.concatenate(shard).astype(np.int32),
        quarantine=tuple(pair for part in parts for pair in part.quarantine),
        classes=numbering.classes,
        notes=numbering.notes,
        **picked,
    )
