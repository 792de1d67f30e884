"""Keyed draws: equal on host and device, uniform, and independent of who draws."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from megatron_nepa.models.draws import drop_path_factors, patch_mask, rope_rescale_factor
from megatron_nepa.parallel.random import derive_key, uniform, uniform_tensor

SAMPLES = np.array([0, 1, 2, 4095, 10**6, 10**12])


def test_numpy_and_torch_draw_the_same() -> None:
    key = derive_key(1337, "crop", 3)
    assert np.array_equal(uniform(key, SAMPLES, 7), uniform_tensor(key, torch.from_numpy(SAMPLES), 7).numpy())


def test_draws_are_pinned() -> None:
    """A change of the generator changes every run: these numbers must not move."""
    expected = [0.9170936346054077, 0.27003955841064453, 0.33749514818191528]
    assert uniform(derive_key(1337, "crop", 3), np.array([0]), 3)[0].tolist() == expected


def test_a_draw_depends_on_its_sample_alone() -> None:
    key = derive_key(0, "x")
    together = uniform(key, np.arange(100), 4)
    alone = np.concatenate([uniform(key, np.array([k]), 4) for k in range(100)])
    assert np.array_equal(together, alone)


def test_draws_are_uniform_and_uncorrelated() -> None:
    draw = uniform(derive_key(1, "x"), np.arange(50_000), 3)
    for column in draw.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(draw[:, 0], draw[:, 1])[0, 1]) < 0.02


def test_seed_purpose_and_layer_change_the_key() -> None:
    keys = {derive_key(seed, purpose, layer) for seed in (0, 1) for purpose in ("a", "b") for layer in (0, 1)}
    assert len(keys) == 8


def test_drop_path_keeps_the_mean_and_grows_with_depth() -> None:
    factors = drop_path_factors(0.4, 5, 3, torch.arange(20_000))
    assert factors.shape == (10, 20_000)
    assert (factors[:2] == 1).all()
    dropped = (factors == 0).float().mean(1)
    torch.testing.assert_close(dropped[::2], torch.linspace(0, 0.4, 5), atol=0.015, rtol=0)
    torch.testing.assert_close(factors.mean(1), torch.ones(10), atol=0.03, rtol=0)


def test_the_mask_is_exact_and_differs_between_samples() -> None:
    mask = patch_mask(0.4, 16, 3, torch.arange(500))
    assert (mask.sum(1) == 6).all()
    assert len({tuple(row) for row in mask.tolist()}) > 300
    torch.testing.assert_close(mask.float().mean(0), torch.full((16,), 6 / 16), atol=0.08, rtol=0)


def test_rope_rescale_is_log_uniform_and_shared_in_its_group() -> None:
    factor = rope_rescale_factor(2.0, 1, 3, torch.arange(20_000))
    assert stats.kstest(factor.log().numpy(), stats.uniform(-np.log(2), 2 * np.log(2)).cdf).pvalue > 1e-3
    grouped = rope_rescale_factor(2.0, 4, 3, torch.arange(8))
    assert grouped.unique().numel() == 2
    assert (grouped[:4] == grouped[0]).all()
