"""Which source of a mixture sample k of a run is drawn from, and which place in the source's own order it takes.

Both are pure functions of (seed, k). The run is cut into blocks of some thousands of samples, of each of which every
source gives the same number. Inside a block each source is spread evenly: its j-th sample of n stands at a time drawn
from [j / n, (j + 1) / n), keyed by the block. So every window has the shares, to a sample or two for each source, and
no source is met in a pattern. A source's samples follow one another in its own order, whose epochs it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.mixture_grammar import BLOCK
from megatron_nepa.data.sampling.order import IntArray, SampleOrder, set_order
from megatron_nepa.parallel.random import derive_key, uniform

_MIXTURE, _SOURCE = "mixture", "source"


@lru_cache(maxsize=4)  # two blocks of two loaders
def _block(seed: int, number: int, per_block: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """Of each place of a block its source, and its number among the block's samples of that source."""
    source = np.repeat(np.arange(len(per_block)), per_block)
    rank = np.concatenate([np.arange(count) for count in per_block])
    draw = uniform(derive_key(seed, _MIXTURE, number), np.arange(len(source)), 1)[:, 0].astype(np.float64)
    # a stable sort: should two times tie, every machine decides alike
    order = np.argsort((rank + draw) / np.asarray(per_block)[source], kind="stable")
    return source[order], rank[order]


@dataclass(frozen=True)
class Mixing:
    """The samples of a run, by the sources that they are drawn from.

    Attributes:
        seed: the run's seed.
        per_block: samples of a block that each source gives.
        since: sample of the run that the first block begins at.
        drawn: samples of each source that the run had drawn before.
    """

    seed: int
    per_block: tuple[int, ...]
    since: int
    drawn: tuple[int, ...]

    @classmethod
    def of(cls, mixture: Mixture, seed: int) -> Mixing:
        """The samples of a run on ``mixture``."""
        sources = mixture.sources
        counts = tuple(source.per_block for source in sources)
        return cls(seed, counts, mixture.since, tuple(source.drawn for source in sources))

    def place(self, sample: IntArray) -> tuple[IntArray, IntArray]:
        """The source of each sample, and its place among all samples of that source, both int64 [n].

        Args:
            sample: sample numbers k, ``since`` or later, int64 [n].
        """
        number, inside = np.divmod(np.asarray(sample) - self.since, BLOCK)
        source, place = np.empty_like(number), np.empty_like(number)
        for value in np.unique(number):
            rows = number == value
            source_of, rank = _block(self.seed, int(value), self.per_block)
            source[rows], place[rows] = source_of[inside[rows]], rank[inside[rows]]
        return source, place + number * np.asarray(self.per_block)[source] + np.asarray(self.drawn)[source]

    def drawn_until(self, samples: int) -> tuple[int, ...]:
        """Samples of each source among the run's first ``samples``."""
        number, inside = divmod(samples - self.since, BLOCK)
        source_of, _ = _block(self.seed, number, self.per_block)
        begun = np.bincount(source_of[:inside], minlength=len(self.per_block)).tolist()
        return tuple(
            before + number * count + now for before, count, now in zip(self.drawn, self.per_block, begun, strict=True)
        )


class MixtureOrder:
    """Which image of a mixture each sample shows: a source's own images in its own order, whatever the other sources.

    Args:
        mixture: the sources.
        seed: the run's seed.
        version: of the order within a source, which the run was begun with.
    """

    def __init__(self, mixture: Mixture, seed: int, version: int) -> None:
        self._mixing, self._starts, self._sizes = Mixing.of(mixture, seed), mixture.starts, mixture.sizes
        # keyed by what the source is, not by its place among the others: it keeps its order when these change
        self._orders = [
            set_order(derive_key(seed, f"{_SOURCE}/{key}"), size, version)
            for key, size in zip(mixture.keys, mixture.sizes, strict=True)
        ]

    def images(self, sample: IntArray, skip: int = 0) -> IntArray:
        """The image that each sample shows; ``skip`` goes on in the same epoch of its source."""
        source, place = self._mixing.place(sample)
        image = np.empty_like(place)
        for number in np.unique(source):
            rows = source == number
            image[rows] = self._starts[number] + self._orders[number].images(place[rows], skip)
        return image

    def source(self, sample: IntArray) -> IntArray:
        """The number of each sample's source."""
        return self._mixing.place(sample)[0]

    def choices(self, source: int) -> int:
        """The images of that source."""
        return self._sizes[source]


def sample_order(index: DatasetIndex | Mixture, seed: int, version: int) -> SampleOrder:
    """The order in which a run shows a set or a mixture."""
    if isinstance(index, Mixture):
        return MixtureOrder(index, seed, version)
    return set_order(seed, len(index), version)


def passes(mixture: Mixture, seed: int, samples: int) -> dict[str, float]:
    """Passes over each source in a run's first ``samples``, by the source's name."""
    drawn = Mixing.of(mixture, seed).drawn_until(samples)
    return {source.name: count / len(source.index) for source, count in zip(mixture.sources, drawn, strict=True)}
