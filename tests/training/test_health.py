"""Embedding health on batches whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_nepa.training.reporting.health import EmbeddingHealth, embedding_health, read_health


def health(rows: Tensor) -> EmbeddingHealth:
    return read_health(embedding_health(rows))


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_isotropic() -> None:
    measured = health(gaussian(4096, 64) * 7.0)
    assert measured.std == pytest.approx(1.0, abs=0.02)
    assert measured.mean_direction < 0.02
    # 256 samples of 64 equal directions: sampling alone spreads the singular values, which lowers the entropy a little
    assert 50 < measured.effective_rank < 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed(dtype: torch.dtype) -> None:
    measured = health(gaussian(1, 64).expand(1000, 64).to(dtype))
    assert measured.std == pytest.approx(0.0, abs=1e-6)
    assert measured.effective_rank == 1.0
    assert measured.mean_direction == pytest.approx(1.0, abs=1e-6)


def test_three_directions() -> None:
    measured = health(gaussian(512, 3) @ torch.eye(3, 64))
    assert measured.effective_rank == pytest.approx(3.0, abs=0.05)
    assert measured.std == pytest.approx(3 * math.sqrt(1 / 3) / 64 * math.sqrt(64), abs=0.02)


def test_near_collapse_is_not_noise() -> None:
    """One direction plus a little along another: two points of a line, so rank 1 and a large mean direction."""
    rows = torch.ones(300, 64) + 1e-3 * gaussian(300, 1) * torch.eye(1, 64)
    measured = health(rows)
    assert measured.effective_rank == pytest.approx(1.0, abs=0.01)
    assert measured.mean_direction > 0.999


def test_equals_the_definition_on_few_rows() -> None:
    rows = gaussian(40, 16)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    share = torch.linalg.svdvals(unit)
    share /= share.sum()
    measured = health(rows)
    assert embedding_health(rows).shape == (2 + 40 * 40,)
    assert measured.effective_rank == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)
    assert measured.std == pytest.approx(float(unit.std(dim=0, unbiased=False).mean() * 4), rel=1e-5)
    assert measured.mean_direction == pytest.approx(float(unit.mean(dim=0).square().sum()), rel=1e-5)


@pytest.mark.parametrize(("samples", "period"), [(256, 256), (256, 257), (64, 16), (2, 256), (1, 1025)])
def test_rows_are_spread_over_samples_and_positions(samples: int, period: int) -> None:
    taken: list[Tensor] = []
    rows = torch.arange(samples * period, dtype=torch.float32)[:, None] + 1.0

    class Spy(torch.overrides.TorchFunctionMode):
        """Keeps the rows that are normalised; each row holds its own number."""

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.nn.functional.normalize:
                taken.append(args[0])
            return func(*args, **(kwargs or {}))

    with Spy():
        flat = embedding_health(rows)
    index = taken[0].flatten().long() - 1
    assert flat.shape == (2 + 256 * 256,)
    assert index.unique().numel() == 256
    gaps = torch.cat((index.sort().values, torch.tensor([samples * period]))).diff(prepend=torch.tensor([0]))
    assert gaps.max() <= samples * period / 20  # no long stretch of rows is left out
    assert (index % period).unique().numel() >= min(period, 256) * 0.6


def test_non_finite_embeddings_give_nan() -> None:
    rows = gaussian(32, 8)
    rows[3, 2] = math.inf
    assert all(math.isnan(value) for value in health(rows))
