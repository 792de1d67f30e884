"""The order of a run is a pure function, and its crops are torchvision's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from megatron_nepa.data.sampling import order


def test_each_epoch_is_a_fresh_permutation() -> None:
    """Every image once an epoch, in an order of its own, whatever the seed."""
    orders = [order.permutation(seed, epoch, 1000) for seed in (0, 7) for epoch in range(3)]
    for one in orders:
        np.testing.assert_array_equal(np.sort(one), np.arange(1000))
    agreement = [(a == b).mean() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreement) < 0.02  # two independent permutations agree in one place on average


def test_positions_of_a_permutation_are_uniform() -> None:
    """Over many epochs an image is seen at every place alike."""
    places = [int(np.flatnonzero(order.permutation(3, epoch, 50) == 11)[0]) for epoch in range(2000)]
    assert stats.chisquare(np.bincount(places, minlength=50)).pvalue > 1e-4


def test_image_of_sample_follows_the_epochs() -> None:
    """A batch that straddles epochs reads each from its own permutation; skip moves on within the epoch."""
    samples = np.arange(95, 325)
    images = order.image_of_sample(5, samples, 100)
    expected = [order.permutation(5, k // 100, 100)[k % 100] for k in samples]
    np.testing.assert_array_equal(images, expected)
    skipped = order.image_of_sample(5, samples, 100, skip=8)
    np.testing.assert_array_equal(skipped, [order.permutation(5, k // 100, 100)[(k + 8) % 100] for k in samples])


def test_threads_that_come_to_an_epoch_shuffle_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slow(seed: int, epoch: int, num_images: int) -> order.IntArray:
        made.append(epoch)
        time.sleep(0.02)
        return np.roll(np.arange(num_images), epoch)

    monkeypatch.setattr(order, "permutation", slow)
    shared = order.SetOrder(5, 100)
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: shared.images(np.arange(95, 105)).tolist(), range(8)))
    assert made == [0, 1]
    assert seen == [[*range(95, 100), 99, *range(4)]] * 8


def test_draws_belong_to_the_sample_alone() -> None:
    """Box and flip of sample k are the same in any batch, and differ from the next sample's."""
    samples = np.arange(10_000, 10_064)
    width, height = np.full(64, 500), np.full(64, 375)
    boxes, flips = order.crop_boxes(1, samples, width, height, 0.08), order.flips(1, samples)
    for i in (0, 17, 63):
        one = slice(i, i + 1)
        np.testing.assert_array_equal(order.crop_boxes(1, samples[one], width[one], height[one], 0.08), boxes[one])
        assert order.flips(1, samples[one])[0] == flips[i]
    assert len(np.unique(boxes, axis=0)) > 60
    assert (order.crop_boxes(2, samples, width, height, 0.08) != boxes).any(axis=1).mean() > 0.9
    assert 0.47 < order.flips(1, np.arange(10_000)).mean() < 0.53


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 300), (1000, 90), (31, 30), (1, 1), (2, 1), (1, 3)])
def test_boxes_have_torchvisions_distribution(size: tuple[int, int]) -> None:
    """Kolmogorov-Smirnov on x, y, width, height, area and ratio, and every box inside the image."""
    width, height = size
    count = 4000
    boxes = order.crop_boxes(9, np.arange(count), np.full(count, width), np.full(count, height), 0.08)
    x, y, w, h = boxes.T.astype(np.int64)
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (w > 0).all()
    assert (h > 0).all()
    assert (x + w <= width).all()
    assert (y + h <= height).all()
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    for ours, other in ((x, theirs[:, 1]), (y, theirs[:, 0]), (w, theirs[:, 3]), (h, theirs[:, 2])):
        assert stats.ks_2samp(ours, other, method="asymp").pvalue > 1e-4
    assert stats.ks_2samp(w * h, theirs[:, 2] * theirs[:, 3], method="asymp").pvalue > 1e-4
    assert stats.ks_2samp(w / h, theirs[:, 3] / theirs[:, 2], method="asymp").pvalue > 1e-4


def test_rejection_rule_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed the same draws, torchvision's own get_params gives the same box, fallback included."""
    rng = np.random.default_rng(0)
    count = 600
    width, height = rng.integers(1, 700, count), rng.integers(1, 700, count)
    width[:100], height[:100] = 900, rng.integers(1, 60, 100)  # so wide that most boxes are refused
    draws = rng.random((count, 22), np.float32)
    monkeypatch.setattr(order, "uniform", lambda key, index, number: draws[:, :number])
    boxes = order.crop_boxes(0, np.arange(count), width, height, 0.08)

    fallbacks = 0
    for i in range(count):
        feed = iter(draws[i, :20].astype(np.float64))
        tail = iter((draws[i, -2], draws[i, -1]))  # y is drawn before x

        def empty_uniform(low: float, high: float, feed: Iterator[float] = feed) -> torch.Tensor:
            return torch.tensor([low + (high - low) * next(feed)], dtype=torch.float64)

        def randint(low: int, high: int, size: tuple[int], tail: Iterator[float] = tail) -> torch.Tensor:
            return torch.tensor([int(low + np.floor(float(next(tail)) * (high - low)))])

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *_: SimpleNamespace(uniform_=empty_uniform))
            patch.setattr(torch, "randint", randint)
            image = torch.zeros(1, int(height[i]), int(width[i]))
            y, x, h, w = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        fallbacks += next(feed, None) is None
        if w == 0 or h == 0:  # torchvision returns an empty box for a 1-pixel sliver; ours keeps one pixel
            assert boxes[i, 2] >= 1
            assert boxes[i, 3] >= 1
            continue
        assert boxes[i].tolist() == [x, y, w, h], f"image {width[i]} x {height[i]}"
    assert fallbacks > 50
