"""What a data set consists of: how many images, of which classes and sizes, and how many of them are odd."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.index.dataset_index import DatasetIndex

_MOST_READ = 100_000  # images whose sizes are looked at; evenly spread where there are more
_MOST_FILES = 2_000  # files that the system is asked about
_ELONGATED = 3.0  # the longer side over the shorter one

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataSummary:
    """The figures of a data set.

    Attributes:
        images: in the set.
        looked_at: images that the figures below are of.
        classes: class names by number, or the numbers as text; () where no image has a label.
        per_class: images of each class among those looked at.
        unlabelled: images without a label among those looked at.
        width: of each image looked at, pixels.
        height: likewise.
        size: bytes of some images.
        left_out: images that cannot be used.
        image_size: side of the crops that the figures are held against.
    """

    images: int
    looked_at: int
    classes: tuple[str, ...]
    per_class: Numbers
    unlabelled: int
    width: Numbers
    height: Numbers
    size: Numbers
    left_out: int
    image_size: int

    @classmethod
    def of(cls, index: DatasetIndex, image_size: int) -> DataSummary:
        """Look at an index, evenly spread where it is large.

        Args:
            index: the images, their sizes known.
            image_size: side of the crops that a run takes.
        """
        rows = _spread(len(index), _MOST_READ)
        label = np.asarray(index.label[rows]).astype(np.int64)
        known = label[label >= 0]
        per_class = np.bincount(known, minlength=len(index.classes)) if len(known) else np.zeros(0, np.int64)
        return cls(
            images=len(index),
            looked_at=len(rows),
            classes=(index.classes or tuple(map(str, range(len(per_class))))) if len(known) else (),
            per_class=per_class,
            unlabelled=int((label < 0).sum()),
            width=np.asarray(index.width[rows]).astype(np.int64),
            height=np.asarray(index.height[rows]).astype(np.int64),
            size=_bytes(index),
            left_out=len(index.quarantine),
            image_size=image_size,
        )

    @classmethod
    def joined(cls, parts: Sequence[DataSummary]) -> DataSummary:
        """The figures of several sets together, without their classes, which mean something else in each."""
        return cls(
            images=sum(part.images for part in parts),
            looked_at=sum(part.looked_at for part in parts),
            classes=(),
            per_class=np.zeros(0, np.int64),
            unlabelled=sum(part.unlabelled for part in parts),
            width=np.concatenate([part.width for part in parts]),
            height=np.concatenate([part.height for part in parts]),
            size=np.concatenate([part.size for part in parts]),
            left_out=sum(part.left_out for part in parts),
            image_size=parts[0].image_size,
        )

    def odd(self) -> dict[str, int]:
        """How many of the images looked at are odd, by how."""
        longer, shorter = np.maximum(self.width, self.height), np.minimum(self.width, self.height)
        found = {
            f"smaller than the crops of {self.image_size}": int((shorter < self.image_size).sum()),
            f"more than {_ELONGATED:g} times as long as wide": int((longer > _ELONGATED * shorter).sum()),
        }
        return found | ({"without a label": self.unlabelled} if len(self.per_class) else {})

    def lines(self) -> Iterator[str]:
        """The figures as text."""
        some = f"of {self.looked_at:,} evenly spread ones: " if self.looked_at < self.images else ""
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        yield f"{self.images:,} images, {self.size.mean() * self.images / 1e9:.3g} GB{left_out}"
        if len(self.per_class):
            filled = self.per_class[self.per_class > 0]
            yield (
                f"classes: {some}{len(filled):,}"
                + (f" of {len(self.classes):,}" if len(filled) < len(self.classes) else "")
                + f", of {filled.min():,} to {filled.max():,} images (median {np.median(filled):,.0f})"
            )
        else:
            yield "classes: no labels"
        for name, sides in (("width", self.width), ("height", self.height)):
            low, middle, high = np.percentile(sides, [5, 50, 95])
            yield (
                f"{name}: {some}{sides.min():,} to {sides.max():,} pixels, median {middle:,.0f}, 90 % {low:,.0f} to "
                f"{high:,.0f}"
            )
        low, middle, high = np.percentile(self.size, [5, 50, 95]) / 1e3
        yield f"file size: median {middle:,.3g} kB, 90 % {low:,.3g} to {high:,.3g} kB"
        odd = ", ".join(f"{count / self.looked_at:.2%} {how}" for how, count in self.odd().items())
        yield f"odd: {some}{odd}"


def _spread(count: int, most: int) -> Numbers:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _bytes(index: DatasetIndex) -> Numbers:
    """Encoded size of some images, evenly spread; files that are gone count nothing."""
    if index.shards:
        return np.asarray(index.size[_spread(len(index), _MOST_READ)]).astype(np.int64)
    sizes = []
    for row in _spread(len(index), _MOST_FILES).tolist():
        try:
            sizes.append(os.stat(index.folder / index.names[row]).st_size)
        except OSError:
            continue
    return np.array(sizes or [0], np.int64)
