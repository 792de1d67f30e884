"""Linear probes and nearest neighbours on a frozen trunk (paper appendix E.2; He et al. 2022, appendix A.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nepa.checkpoint.described import holds_weights_alone
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.config import AugmentationConfig, ConfigError, DataConfig, ProbingConfig, require
from megatron_nepa.data.decoding.timed_settings import Decoded
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.loaders.classification import FinetuningLoader
from megatron_nepa.data.loaders.pretraining import Batch
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.flops import forward_flops
from megatron_nepa.models.probe import LinearProbe, ProbedTrunk, TrunkFeatures
from megatron_nepa.models.trunk import DTYPES, Trunk
from megatron_nepa.parallel.batch_norm import BatchNorm
from megatron_nepa.parallel.parameters import initialize_parameters
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.tasks.classification import (
    ClassificationEvaluator,
    evaluation_loader,
    evaluation_settings,
    evaluation_steps,
    labelled_sets,
    soft_cross_entropy,
)
from megatron_nepa.tasks.features import extract_features, knn_accuracy
from megatron_nepa.tasks.knn import TEMPERATURE
from megatron_nepa.terminal import counted
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.evaluation import load_weights
from megatron_nepa.training.results import identify_weights, require_results, write_results
from megatron_nepa.training.task import Task

# MAE's probe sees random crops and flips alone
CROPS_ONLY = AugmentationConfig(rand_augment=None, random_erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)


class ProbingTask(Task):
    """A linear layer on the features of a trunk that stays as it is; what is trained and saved is the layer alone.

    Args:
        run: the config.
        topology: this rank's place.
        kernels: implementations of the trunk's fused operations.

    Attributes:
        run: the config, with the checkpoint that the trunk was found in: a run goes on with that one.

    Raises:
        ConfigError: for data that cannot serve, or a checkpoint that holds no such trunk.
    """

    def __init__(self, run: ProbingConfig, topology: Topology, kernels: Kernels) -> None:
        path = run.trunk.path
        require(path is not None, "a probe needs a trained trunk: give its checkpoint as --trunk.")
        assert path is not None
        if not holds_weights_alone(path):
            path = str(find_checkpoint(path))
        self.run = replace(run, trunk=replace(run.trunk, path=path))
        self.topology = topology
        self.index, self.validation = labelled_sets(run, topology)
        self.classes = self.index.classes
        self.num_images = len(self.index)
        self.data_fingerprint = self.index.fingerprint()
        self.reads_remote = self.index.is_remote
        self.flops_per_image = float(forward_flops(run.model))
        self.features, self.origin = _frozen_features(self.run, topology, kernels)
        self.evaluator = None
        if self.validation is not None:
            every = evaluation_steps(run, self.index)
            self.evaluator = ProbingEvaluator(run, self.features, self.validation, topology, every)

    def build_model(self, kernels: Kernels) -> nn.Module:
        """The layer, drawn from the run's seed."""
        run, topology = self.run, self.topology
        build = Build.of(run, topology.tensor, kernels)
        new_norm = partial(BatchNorm, group=topology.data_group)
        return LinearProbe(run.model.hidden_size, self.index.num_classes, build, new_norm)

    def build_loader(self, feed: Feed, data: DataConfig) -> FinetuningLoader:
        """This rank's cropped and flipped micro-batches."""
        run = self.run
        return FinetuningLoader(self.index, data, CROPS_ONLY, run.model.image_size, self.index.num_classes, feed)

    def decoded(self) -> Decoded:
        """Random crops."""
        run = self.run
        return Decoded(self.index, run.model.image_size, self.topology.device, run.data.crop_scale_min)

    def learning_rates(self, total_steps: int) -> LearningRates:
        """One rate."""
        return LearningRates(self.run, total_steps)

    def forward(self, engine: TrainingEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch."""
        logits: Tensor = engine.forward(self.features(batch.images, batch.sample_index))
        loss = soft_cross_entropy(logits, batch.labels, self.topology.tensor)
        return loss, {"loss": loss.detach()}

    def evaluation_settings(self) -> dict[str, Any]:
        """The images and how they are shown, and the features: of which trunk, which of them, in which dtype."""
        assert self.validation is not None
        trunk = self.run.trunk
        assert trunk.path is not None
        return {
            **evaluation_settings(self.run, self.validation, self.run.dtype),
            "trunk": identify_weights(trunk.path, trunk.weights),
            "block": trunk.block,  # None: the final norm's output
            "pooling": trunk.pooling,
        }


class ProbingEvaluator(ClassificationEvaluator):
    """Accuracy of the trunk with its probe over a whole validation set, exact across ranks.

    Args:
        run: the config.
        features: computes the frozen trunk's features.
        index: labelled images.
        topology: this rank's place.
        every: steps between evaluations.
    """

    at_start = True

    def __init__(
        self, run: ProbingConfig, features: TrunkFeatures, index: DatasetIndex, topology: Topology, every: int
    ) -> None:
        super().__init__(run, index, topology, every)
        self.features = features

    def evaluate(self, model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Top-1 and top-5 accuracy as shares of 1, and the mean cross-entropy."""
        return super().evaluate(ProbedTrunk(self.features, model), interrupted)


@torch.no_grad()
def evaluate_neighbours(task: ProbingTask) -> dict[str, float]:
    """Classify the validation images by their nearest training images; every rank calls it.

    Every image is resized and cropped as in an evaluation. The accuracies go with their settings to ``neighbours.json``
    in the run's folder (see :mod:`~megatron_nepa.training.results`) and to the console.

    Raises:
        ConfigError: for fewer training images than neighbours.
    """
    run, topology = task.run, task.topology
    assert run.knn is not None
    assert task.validation is not None
    require(
        len(task.index) >= run.knn,
        f"--knn {run.knn} neighbours are asked of the {counted(len(task.index), 'image')} of {task.index.root}: ask "
        f"for {len(task.index)} or less.",
    )
    results_file = Path(run.output_dir) / "neighbours.json"
    require_results(results_file, topology)
    sets = []
    for index in (task.index, task.validation):
        loader = evaluation_loader(run, index, topology, DTYPES[run.dtype])
        found = extract_features(task.features, loader, len(index), topology)
        assert found is not None
        sets.append(found)
    results = knn_accuracy(sets[0], sets[1], run.knn, topology)
    if topology.is_main:
        settings = {
            **task.evaluation_settings(),
            "train_data": run.data.path,
            "train_images": len(task.index),
            "k": run.knn,
            "temperature": TEMPERATURE,
        }
        write_results(results_file, task.origin, settings, results)
    return results


def _frozen_features(run: ProbingConfig, topology: Topology, kernels: Kernels) -> tuple[TrunkFeatures, str]:
    trunk = Trunk(run.model, Build.of(run, topology.tensor, kernels))
    initialize_parameters(trunk, run.seed, run.model.init_std, topology.tensor)
    features = TrunkFeatures(trunk, run.trunk.block, run.trunk.pooling).requires_grad_(False).eval()
    features.to(topology.device, DTYPES[run.dtype])
    assert run.trunk.path is not None
    try:
        return features, load_weights(features, run.trunk.path, run.trunk.weights, run.model, topology)
    except ConfigError as error:  # name the flags of a probe
        message = str(error).replace("--init_from", "--trunk").replace("--init_weights", "--trunk.weights")
        raise ConfigError(message) from None
