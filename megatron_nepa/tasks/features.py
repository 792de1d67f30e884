"""Features of whole data sets, and what they tell of the classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_nepa.data.loaders.evaluation import OnePassLoader
from megatron_nepa.models.probe import TrunkFeatures
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.tasks.knn import weighted_knn
from megatron_nepa.training.lost_source import evaluated


class Features(NamedTuple):
    """Features of the n images of a data set in the order of its index, equal on all ranks.

    Attributes:
        values: fp32 [n, D].
        labels: int64 [n].
    """

    values: Tensor
    labels: Tensor


def extract_features(
    features: TrunkFeatures,
    loader: OnePassLoader,
    num_images: int,
    topology: Topology,
    interrupted: Callable[[], bool] = lambda: False,
) -> Features | None:
    """Features of every image; each replica computes its share, and all ranks receive the whole.

    Args:
        features: in evaluation mode.
        loader: this rank's share of the images.
        num_images: n, over all ranks.
        topology: this rank's place.
        interrupted: a collective, called between batches.

    Returns:
        The features, or None where ``interrupted`` said so.
    """
    values, labels = [], []
    shown = None if topology.is_main else True  # None: where there is a terminal
    batches = evaluated(loader, topology)
    for batch in tqdm(batches, "features", len(loader), unit=" batches", leave=False, disable=shown):
        if interrupted():
            return None
        values.append(features(batch.images, batch.image_index))
        labels.append(batch.labels)
    return Features(
        _interleaved(torch.cat(values), topology)[:num_images], _interleaved(torch.cat(labels), topology)[:num_images]
    )


def knn_accuracy(train: Features, validation: Features, k: int, topology: Topology) -> dict[str, float]:
    """Accuracy of the weighted ``k`` nearest neighbours as shares of 1; the replicas divide the work.

    Raises:
        ConfigError: for fewer training images than neighbours.
    """
    mine = slice(topology.data_rank, None, topology.data_size)
    hits = weighted_knn(train.values, train.labels, validation.values[mine], validation.labels[mine], k)
    sums = torch.tensor(hits, dtype=torch.int64, device=topology.device)
    dist.all_reduce(sums, group=topology.data_group)
    top1, top5, images = sums.tolist()
    return {"knn_top1": top1 / images, "knn_top5": top5 / images}


def linear_accuracy(train: Features, validation: Features, topology: Topology) -> dict[str, float]:
    """Accuracy of a logistic regression on standardised features, scikit-learn's with its own regularisation.

    It draws nothing at random. The main rank computes it and tells the others; nan for features that are not finite.
    """
    # imported here: it takes seconds, and few runs probe
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    accuracy = torch.full((1,), math.nan, dtype=torch.float64)
    if topology.is_main and bool(train.values.isfinite().all() and validation.values.isfinite().all()):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train.values.cpu().numpy(), train.labels.cpu().numpy())
        accuracy[0] = classifier.score(validation.values.cpu().numpy(), validation.labels.cpu().numpy())
    dist.broadcast(accuracy, src=0, group=topology.host_group)
    return {"linear_top1": accuracy.item()}


def _interleaved(mine: Tensor, topology: Topology) -> Tensor:
    """The rows of all replicas, row i being number i // data_size of replica i mod data_size."""
    size = topology.data_size
    joined = mine.new_empty(size * mine.shape[0], *mine.shape[1:])
    dist.all_gather_into_tensor(joined, mine.contiguous(), group=topology.data_group)
    return joined.view(size, *mine.shape).transpose(0, 1).reshape(joined.shape)
