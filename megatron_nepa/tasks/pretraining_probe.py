"""A probe of the features while they are pre-trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from megatron_nepa.config import EvaluationConfig, PretrainingConfig, require
from megatron_nepa.data.index.agreement import check_same_classes
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.loaders.evaluation import EvaluationLoader, decode_all
from megatron_nepa.models.probe import TrunkFeatures
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.objectives.objective import PretrainingModel
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.tasks.classification import labelled_index
from megatron_nepa.tasks.features import Features, extract_features, knn_accuracy, linear_accuracy

SHOWN = EvaluationConfig()  # as a classifier and the features of a trained trunk are evaluated by default


class PretrainingProbe:
    """Classifies a few labelled images by their features: by nearest neighbours and by a logistic regression.

    It draws nothing and leaves the model as it is: a run computes the same with and without it.

    Args:
        run: the config, its ``probe`` section above all.
        topology: this rank's place.

    Raises:
        ConfigError: for images that cannot serve.
    """

    prefix = "probe_"
    best = None
    at_start = True  # what the features are worth by the architecture alone

    def __init__(self, run: PretrainingConfig, topology: Topology) -> None:
        self.run, self.topology, self.every = run, topology, run.probe.every
        probe = run.probe
        labelled = labelled_index(run.data, probe.data, topology, "--probe_data")
        if probe.validation_data is None:
            self.train, self.validation = halves(labelled)
        else:
            validation = labelled_index(run.data, probe.validation_data, topology, "--probe_validation_data")
            check_same_classes(labelled, validation)
            self.train, self.validation = labelled, validation
        require(
            len(self.train) >= probe.neighbours,
            f"{probe.neighbours} neighbours are asked of the {len(self.train)} training images of --probe_data "
            f"{probe.data}: set --probe.neighbours to {len(self.train)} or less, or give more images.",
        )

    def decode_all(self, interrupted: Callable[[], bool]) -> None:
        """Decode this rank's labelled images once."""
        for index in (self.train, self.validation):
            decode_all(self._loader(index), interrupted)

    def evaluate(self, model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Accuracies as shares of 1."""
        assert isinstance(model, PretrainingModel)
        probe, topology = self.run.probe, self.topology
        features = TrunkFeatures(model.trunk, probe.block, probe.pooling)
        train = self._extract(features, self.train, interrupted)
        validation = None if train is None else self._extract(features, self.validation, interrupted)
        if train is None or validation is None:
            return None
        return {
            **knn_accuracy(train, validation, probe.neighbours, topology),
            **linear_accuracy(train, validation, topology),
        }

    def _extract(
        self, features: TrunkFeatures, index: DatasetIndex, interrupted: Callable[[], bool]
    ) -> Features | None:
        return extract_features(features, self._loader(index), len(index), self.topology, interrupted)

    def _loader(self, index: DatasetIndex) -> EvaluationLoader:
        run, topology = self.run, self.topology
        return EvaluationLoader(
            index,
            run.data,
            run.model.image_size,
            resize_size=SHOWN.shorter_side(run.model.image_size),
            squash=SHOWN.squash,
            batch_size=run.probe.batch_size,
            data_rank=topology.data_rank,
            data_size=topology.data_size,
            device=topology.device,
            dtype=DTYPES[run.dtype],
        )


def halves(index: DatasetIndex) -> tuple[DatasetIndex, DatasetIndex]:
    """Every other image of each class, in the order of the index, and the rest; the first half gets the odd one.

    Raises:
        ConfigError: where no class has two images.
    """
    label = np.asarray(index.label)
    order = np.argsort(label, kind="stable")
    sorted_label = label[order]
    place = np.arange(len(label)) - np.searchsorted(sorted_label, sorted_label)  # within its class
    first, second = np.sort(order[place % 2 == 0]), np.sort(order[place % 2 == 1])
    require(len(second) > 0, f"{index.root} has one image a class: it takes two or more to train on one half of them.")
    return index.select(first), index.select(second)
