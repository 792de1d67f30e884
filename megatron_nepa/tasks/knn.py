"""Weighted nearest neighbours on frozen features, as DINO evaluates them (Caron et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_nepa.config import require

TEMPERATURE = 0.07  # of the votes, DINO's


class KnnHits(NamedTuple):
    """How many samples were classified rightly; counts, so that ranks which share the samples can add them.

    Attributes:
        top1: samples whose label got the most votes.
        top5: samples whose label is among the five with the most votes, having got any.
        total: samples.
    """

    top1: int
    top5: int
    total: int


@torch.no_grad()
def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = TEMPERATURE,
    chunk: int = 4096,
) -> KnnHits:
    """Classify each sample by the votes of its ``k`` nearest training samples, weighted by exp(cosine / temperature).

    The neighbours are exact. Cosines are formed ``chunk`` x ``chunk`` at a time, so memory does not grow with n x m.

    Args:
        train_features: [n, D], any float dtype; normalised here.
        train_labels: int64 [n].
        features: of the samples to classify, [m, D].
        labels: theirs, int64 [m]; a class that no training sample has is never hit.
        k: neighbours that vote.
        temperature: divides a neighbour's similarity in the exponent of its weight.
        chunk: training samples, and samples, of one product.

    Raises:
        ConfigError: for fewer training samples than neighbours.
    """
    require(
        1 <= k <= len(train_labels),
        f"{k} neighbours are asked of {len(train_labels)} training samples: choose 1 to {len(train_labels)}.",
    )
    num_classes = int(train_labels.max()) + 1
    top1 = top5 = 0
    for query, label in zip(features.split(chunk), labels.split(chunk), strict=True):
        cosine, neighbour = _nearest(query, train_features, k, chunk)
        votes = cosine.new_zeros(len(query), num_classes)
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # of the nearest 1: no temperature overflows
        votes.scatter_add_(1, train_labels[neighbour], weight)
        order = votes.argsort(dim=1, descending=True, stable=True)[:, :5]  # equal votes: the lower class first
        hit = (order == label[:, None]) & (votes.gather(1, order) > 0)  # [queries, up to 5]
        top1 += int(hit[:, 0].sum())
        top5 += int(hit.any(1).sum())
    return KnnHits(top1, top5, len(labels))


def _nearest(query: Tensor, train_features: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Cosines fp32 and numbers int64 of the ``k`` nearest training samples, [queries, k] each."""
    query = normalize(query.float())
    cosine = query.new_empty(len(query), 0)
    neighbour = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start, part in zip(range(0, len(train_features), chunk), train_features.split(chunk), strict=True):
        found = query @ normalize(part.float()).t()
        number = torch.arange(start, start + len(part), device=query.device).expand(len(query), -1)
        # the best so far compete with this part's
        cosine, neighbour = torch.cat((cosine, found), 1), torch.cat((neighbour, number), 1)
        cosine, place = cosine.topk(min(k, cosine.shape[1]), dim=1)
        neighbour = neighbour.gather(1, place)
    return cosine, neighbour
