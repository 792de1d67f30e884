"""Weighted nearest neighbours against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_nepa.config import ConfigError
from megatron_nepa.tasks.knn import weighted_knn


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of nine overlapping classes, of any length, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (count,), generator=generator)
    centres = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    features = centres[labels] + 1.5 * torch.randn(count, 6, generator=generator)
    return features * (0.1 + 5 * torch.rand(count, 1, generator=generator)), labels


def brute_force(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray, k: int, temperature: float
) -> tuple[int, int]:
    top1 = top5 = 0
    for sample, label in zip(test, labels, strict=True):
        cosines = [float(sample @ other / np.linalg.norm(sample) / np.linalg.norm(other)) for other in train]
        votes: dict[int, float] = {}
        for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0.0) + np.exp((cosines[i] - max(cosines)) / temperature)
        ranked = sorted(votes, key=lambda vote: -votes[vote])
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
    return top1, top5


@pytest.mark.parametrize("chunk", [7, 64, 4096])
@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (20, 1.0), (20, 0.005)])
def test_against_a_count_by_hand(k: int, temperature: float, chunk: int) -> None:
    train, train_labels = draw(150, seed=1)
    test, labels = draw(60, seed=2)
    hits = weighted_knn(train, train_labels, test, labels, k, temperature, chunk)
    expected = brute_force(train.numpy(), train_labels.numpy(), test.numpy(), labels.numpy(), k, temperature)
    assert (hits.top1, hits.top5) == expected
    assert hits.total == 60
    assert 10 < hits.top1 < 55, "the case tells nothing"


def test_shares_add_up() -> None:
    train, train_labels = draw(150, seed=1)
    test, labels = draw(61, seed=2)
    whole = weighted_knn(train, train_labels, test, labels)
    parts = [weighted_knn(train, train_labels, test[rank::2], labels[rank::2]) for rank in range(2)]
    assert tuple(map(sum, zip(*parts, strict=True))) == whole


def test_every_training_sample_finds_itself() -> None:
    train, train_labels = draw(150, seed=1)
    assert weighted_knn(train, train_labels, train.bfloat16(), train_labels, k=1) == (150, 150, 150)


def test_a_class_without_votes_is_no_hit() -> None:
    """Two classes vote; the three that fill up the five do not count, nor does a class beyond those of the training."""
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([3, 3, 6])
    test = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert weighted_knn(train, labels, test, torch.tensor([3, 6, 0, 9]), k=3) == (1, 2, 4)


def test_memory_does_not_grow_with_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, real = [0], torch.Tensor.topk

    def topk(self: torch.Tensor, *arguments: object, **named: object) -> object:
        largest[0] = max(largest[0], self.numel())
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    train, train_labels = draw(500, seed=1)
    weighted_knn(train, train_labels, train, train_labels, k=20, chunk=50)
    assert largest[0] == 50 * (50 + 20)


def test_too_few_training_samples() -> None:
    train, train_labels = draw(10, seed=1)
    with pytest.raises(ConfigError, match="20 neighbours are asked of 10 training samples: choose 1 to 10"):
        weighted_knn(train, train_labels, train, train_labels)
