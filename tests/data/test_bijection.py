"""The order of many images is a true permutation that no statistic tells from a shuffle."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from megatron_nepa.config import ConfigError
from megatron_nepa.data.sampling import bijection, order
from megatron_nepa.data.sampling.bijection import KeyedBijection
from megatron_nepa.parallel.random import words

IntArray = npt.NDArray[np.int64]
Draw = Callable[[int, int], IntArray]  # seed, epoch -> a permutation

LARGE = order.LARGEST_SHUFFLE + 7  # the smallest sets that are not shuffled: the hardest to hide the network in
BINS = 32


def computed(seed: int, epoch: int) -> IntArray:
    """The order as training asks for it."""
    return order.image_of_sample(seed, np.arange(epoch * LARGE, (epoch + 1) * LARGE), LARGE)


def shuffled(seed: int, epoch: int) -> IntArray:
    """What the former is held against."""
    return np.random.default_rng([seed, epoch]).permutation(LARGE)


def inverse(permutation: KeyedBijection, image: IntArray) -> IntArray:
    """The place that leads to each image, by undoing the rounds."""
    a = math.isqrt(permutation.size)
    b = -(-permutation.size // a)

    def undone(number: IntArray) -> IntArray:
        left, right = (digit.astype(np.uint64) for digit in np.divmod(number, b))
        for i in reversed(range(len(permutation.keys))):
            digit, other, base = (left, right, a) if i % 2 == 0 else (right, left, b)
            added = (words(permutation.keys[i], other) >> np.uint64(1)) % np.uint64(base)
            digit[...] = (digit + np.uint64(base) - added) % np.uint64(base)
        return (left * np.uint64(b) + right).astype(np.int64)

    place = undone(image)
    while (outside := place >= permutation.size).any():
        place[outside] = undone(place[outside])
    return place


def test_small_sizes_exhaustively() -> None:
    """Every size up to 2,048, squares and their neighbours among them: each number once."""
    for size in range(1, 2049):
        places = KeyedBijection.derive(3, "test", size, size)(np.arange(size))
        assert np.array_equal(np.sort(places), np.arange(size)), size


def test_thousands_of_large_sizes_have_an_inverse() -> None:
    """Sizes up to 2**40 and some of 2**62: what the rounds do is undone, so no two places lead to one image."""
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.uniform(11, 40, 3000)).astype(np.int64).tolist()
    roots = [root**2 + offset for root in (2**12, 2**16 - 1, 2**20, 2**31 - 1) for offset in (-1, 0, 1, root)]
    for size in [*sizes, *roots, 2**62 - 1, 2**62]:
        permutation = KeyedBijection.derive(1, "test", 0, size)
        places = np.concatenate([rng.integers(0, size, 60), [0, size - 1]])
        images = permutation(places)
        assert images.min() >= 0
        assert images.max() < size
        assert np.array_equal(inverse(permutation, images), places), size


def test_an_epoch_shows_every_image_once() -> None:
    """The first sizes beyond the shuffle, whole, in batches that straddle epochs."""
    count = order.LARGEST_SHUFFLE + 1
    for size in (count, count + 1, 1_281_167):
        samples = np.arange(size - 5, 2 * size + 5)
        images = order.image_of_sample(2, samples, size)
        assert np.array_equal(np.sort(images[5:-5]), np.arange(size)), size


def test_few_images_keep_their_shuffle() -> None:
    """Up to 2**20 images both versions are the shuffle of old; beyond, version 1 alone."""
    samples = np.arange(100)
    for size in (1000, order.LARGEST_SHUFFLE):
        shuffle = order.permutation(4, 0, size)[:100]
        for version in (1, 2):
            assert np.array_equal(order.image_of_sample(4, samples, size, version=version), shuffle)
    size = order.LARGEST_SHUFFLE + 1
    assert np.array_equal(order.image_of_sample(4, samples, size, version=1), order.permutation(4, 0, size)[:100])
    assert not np.array_equal(order.image_of_sample(4, samples, size), order.permutation(4, 0, size)[:100])
    # of numpy's generators none takes part: these are the same on every machine and release
    assert order.permutation(0, 0, 10).tolist() == [8, 1, 2, 9, 6, 3, 0, 5, 7, 4]
    assert order.image_of_sample(0, samples[:4], 10**9).tolist() == [578089199, 917326676, 395624293, 892882681]


def test_walks_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """However bad the size, fewer than 1 place in 500 is walked on, and none three times in a row."""
    calls: list[int] = []
    rounds = KeyedBijection._rounds

    def counted(self: KeyedBijection, place: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        calls.append(len(place))
        return rounds(self, place)

    monkeypatch.setattr(KeyedBijection, "_rounds", counted)
    for root in (1025, 4096, 70_001):
        for size in (root**2 - 1, root**2, root**2 + 1, root**2 + root + 1):
            calls.clear()
            KeyedBijection.derive(0, "test", 0, size)(np.arange(100_000))
            assert sum(calls[1:]) < 200, size
            assert len(calls) <= 3, size


def p_values(draw: Draw) -> dict[str, list[float]]:
    """How likely chance alone is to give what a source of permutations shows, by what was looked at."""
    places = np.arange(LARGE)
    found: dict[str, list[float]] = {}

    def uniform(name: str, *numbers: IntArray) -> None:
        cells = np.zeros(len(numbers[0]), np.int64)
        for number in numbers:
            cells = cells * BINS + number * BINS // LARGE
        found.setdefault(name, []).append(stats.chisquare(np.bincount(cells, minlength=BINS ** len(numbers))).pvalue)

    for seed in range(6):
        one, next_epoch, next_seed = draw(seed, 0), draw(seed, 1), draw(seed + 100, 0)
        uniform("position against image", places, one)
        uniform("low digits of position against image", places * 1031 % LARGE, one * 1031 % LARGE)
        uniform("neighbours", one[:-1], one[1:])
        uniform("steps between neighbours", (one[1:] - one[:-1]) % LARGE)
        uniform("a root apart", one[: -math.isqrt(LARGE)], one[math.isqrt(LARGE) :])
        uniform("between epochs", one, next_epoch)
        uniform("steps between epochs", (next_epoch - one) % LARGE)
        uniform("between seeds", one, next_seed)
        uniform("steps between seeds", (next_seed - one) % LARGE)
        rises = float((one[1:] > one[:-1]).sum())
        found.setdefault("rises", []).append(2 * stats.norm.sf(abs(rises - (LARGE - 1) / 2) / math.sqrt(LARGE / 12)))
        fixed = int((one == places).sum())
        found.setdefault("fixed points", []).append(
            2 * min(stats.poisson.cdf(fixed, 1), stats.poisson.sf(fixed - 1, 1))
        )
    return found


@pytest.mark.parametrize("draw", [computed, shuffled], ids=["computed", "numpy's shuffle"])
def test_nothing_tells_it_from_a_shuffle(draw: Draw) -> None:
    """Positions, neighbours, epochs and seeds, by the same statistics as numpy's shuffle."""
    for name, values in p_values(draw).items():
        assert min(values) > 1e-4, name
        assert stats.combine_pvalues(np.clip(values, 1e-12, 1)).pvalue > 1e-3, name


def test_one_place_over_many_epochs_and_seeds() -> None:
    """The image that a batch begins with is drawn afresh each epoch, for every seed."""
    for place in (0, 1, LARGE // 2, LARGE - 1):
        epochs = [int(order.image_of_sample(5, np.array([e * LARGE + place]), LARGE)[0]) for e in range(1500)]
        seeds = [int(order.image_of_sample(s, np.array([place]), LARGE)[0]) for s in range(1500)]
        for images in (epochs, seeds):
            assert stats.kstest(np.array(images) / LARGE, "uniform").pvalue > 1e-4
            assert abs(stats.pearsonr(images[1:], images[:-1]).statistic) < 0.12


def test_the_statistics_notice_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds are too few, and seen to be."""
    monkeypatch.setattr(bijection, "_ROUNDS", 2)
    order.set_order.cache_clear()
    try:
        assert min(min(values) for values in p_values(computed).values()) < 1e-6
    finally:
        order.set_order.cache_clear()


@pytest.mark.parametrize("version", [0, 3])
def test_an_unknown_order_is_refused_by_name(version: int) -> None:
    """A run of a later release is not continued in an order that it did not have."""
    with pytest.raises(ConfigError, match=f"ckpt is of a run whose images come in order version {version}; this"):
        order.require_known_order(version, "ckpt")
