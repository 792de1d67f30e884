"""Fine-tuning to image classification as a task of the shared loop (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from megatron_nepa.config import ClassificationConfig, DataConfig, ProbingConfig, require
from megatron_nepa.data.decoding.timed_settings import Decoded
from megatron_nepa.data.index.agreement import check_same_classes
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.loaders.classification import FinetuningLoader, check_mixing
from megatron_nepa.data.loaders.evaluation import EvaluationLoader, decode_all
from megatron_nepa.data.loaders.pretraining import Batch, build_index
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.classifier import Classifier
from megatron_nepa.models.flops import train_flops
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.collectives import gather_rows
from megatron_nepa.parallel.topology import TensorGroup, Topology
from megatron_nepa.terminal import counted
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.lost_source import evaluated
from megatron_nepa.training.task import Task

_MOST_EMPTY_CLASSES = 100_000  # of a small part of a set of many classes


class ClassificationTask(Task):
    """Cross-entropy with the augmented images' soft targets.

    Args:
        run: the config.
        topology: this rank's place.

    Raises:
        ConfigError: for data without labels, or whose classes do not fit each other or the head.
    """

    def __init__(self, run: ClassificationConfig, topology: Topology) -> None:
        self.run = run
        self.topology = topology
        self.reset_head = run.reset_head
        if not run.evaluation.only:
            check_mixing(run.augmentation, Share.of(run, topology))  # before images are listed and a model is built
        index, validation = labelled_sets(run, topology)
        self.index, self.reads_remote = index, index.is_remote
        self.classes = index.classes
        self.num_classes = run.head.num_classes or index.num_classes
        self.num_images = len(index)
        self.data_fingerprint = index.fingerprint()
        self.flops_per_image = float(train_flops(run.model))
        self.evaluator: ClassificationEvaluator | None = None
        if validation is not None:
            self.evaluator = ClassificationEvaluator(run, validation, topology, every=evaluation_steps(run, index))

    def build_model(self, kernels: Kernels) -> nn.Module:
        """The model, drawn from the run's seed."""
        run = self.run
        tensor = self.topology.tensor
        return Classifier(run.model, self.num_classes, run.head.pooling, Build.of(run, tensor, kernels))

    def build_loader(self, feed: Feed, data: DataConfig) -> FinetuningLoader:
        """This rank's augmented micro-batches."""
        run = self.run
        return FinetuningLoader(self.index, data, run.augmentation, run.model.image_size, self.num_classes, feed)

    def decoded(self) -> Decoded:
        """Random crops."""
        run = self.run
        device = torch.device("cpu") if run.augmentation.rand_augment else self.topology.device
        return Decoded(self.index, run.model.image_size, device, run.data.crop_scale_min)

    def learning_rates(self, total_steps: int) -> LearningRates:
        """A rate for every layer."""
        return LearningRates(self.run, total_steps, self.run.layer_decay)

    def forward(self, engine: TrainingEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch."""
        logits: Tensor = engine.forward(batch.images, batch.sample_index)
        loss = soft_cross_entropy(logits, batch.labels, self.topology.tensor)
        return loss, {"loss": loss.detach()}

    def evaluation_settings(self) -> dict[str, Any]:
        """The images and how they are shown, and the feature that is classified."""
        assert self.evaluator is not None
        shown = evaluation_settings(self.run, self.evaluator.index, self.run.dtype)
        return {**shown, "pooling": self.run.head.pooling}


class ClassificationEvaluator:
    """Accuracy over a whole validation set, exact across ranks.

    Args:
        run: the config.
        index: labelled images.
        topology: this rank's place.
        every: steps between evaluations.
    """

    prefix = "val_"
    best = "top1"
    at_start = False

    def __init__(
        self, run: ClassificationConfig | ProbingConfig, index: DatasetIndex, topology: Topology, every: int
    ) -> None:
        self.run, self.index, self.topology, self.every = run, index, topology, every

    def decode_all(self, interrupted: Callable[[], bool]) -> None:
        """Decode this rank's validation images once."""
        run = self.run
        decode_all(evaluation_loader(run, self.index, self.topology, DTYPES[run.dtype]), interrupted)

    def evaluate(self, model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Top-1 and top-5 accuracy as shares of 1, and the mean cross-entropy; every image counts once."""
        run, topology = self.run, self.topology
        loader = evaluation_loader(run, self.index, topology, DTYPES[run.dtype])
        sums = torch.zeros(4, dtype=torch.float64, device=topology.device)  # images, top-1, top-5, cross-entropy
        shown = None if topology.is_main else True  # None: where there is a terminal
        batches = evaluated(loader, topology)
        for batch in tqdm(batches, "evaluating", len(loader), unit=" batches", leave=False, disable=shown):
            if interrupted():
                return None
            logits = model(batch.images, batch.image_index)
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
            loss = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
            columns = (torch.ones_like(loss), top[:, 0], top.any(dim=1), loss)
            sums += torch.stack([column[batch.valid].double().sum() for column in columns])
        dist.all_reduce(sums, group=topology.data_group)
        images, top1, top5, loss_sum = sums.tolist()
        return {"top1": top1 / images, "top5": top5 / images, "loss": loss_sum / images}


def labelled_sets(
    run: ClassificationConfig | ProbingConfig, topology: Topology
) -> tuple[DatasetIndex, DatasetIndex | None]:
    """Training and validation images, whose classes agree; the latter for both where a run only evaluates.

    Raises:
        ConfigError: for images without labels, of one class, or whose classes do not fit each other.
    """
    evaluation = run.evaluation
    validation = (
        None if evaluation.data is None else labelled_index(run.data, evaluation.data, topology, "--validation_data")
    )
    if evaluation.only:  # needs no training data
        assert validation is not None
        return validation, validation
    index = labelled_index(run.data, run.data.path, topology)
    if validation is not None:
        check_same_classes(index, validation)
    return index, validation


def labelled_index(data: DataConfig, path: str | None, topology: Topology, flag: str = "--data") -> DatasetIndex:
    """Labelled images of two classes or more.

    Args:
        data: settings of the run's data.
        path: the images' folder or index.
        topology: this rank's place.
        flag: that gives the path, for messages.

    Raises:
        ConfigError: where there is no path, or images have no label or all the same.
    """
    require(path is not None, f"classification needs labelled images: give {flag} (an ImageFolder tree or an index).")
    index = build_index(replace(data, path=path), verbose=topology.is_main)
    require(index is not None, f"synthetic images have no labels: give {flag} a labelled folder or index.")
    assert index is not None
    labels = index.found_labels
    require(
        bool((labels >= 0).all()),
        f"{index.root} has images without a label: classification takes a folder for each class, or an index with "
        "labels.",
    )
    require(
        index.num_classes <= max(len(index), _MOST_EMPTY_CLASSES),
        f"the labels of {index.root} go up to {labels[-1]:,}, far beyond its {counted(len(index), 'image')}: number "
        "the classes from 0, one after another.",
    )
    require(
        len(labels) > 1,
        f"all {counted(len(index), 'image')} of {index.root} are of one class: classification takes a folder "
        "for each of two classes or more.",
    )
    return index


def evaluation_steps(run: ClassificationConfig | ProbingConfig, index: DatasetIndex) -> int:
    """Steps between evaluations: the config's, or those of an epoch over ``index``."""
    return run.evaluation.every or max(1, round(len(index) / run.global_batch_size))


def evaluation_loader(
    run: ClassificationConfig | ProbingConfig, index: DatasetIndex, topology: Topology, dtype: torch.dtype
) -> EvaluationLoader:
    """This rank's share of a set, resized and cropped as ``run.evaluation`` says."""
    return EvaluationLoader(
        index,
        run.data,
        run.model.image_size,
        run.evaluation.shorter_side(run.model.image_size),
        run.evaluation.squash,
        run.evaluation.batch_size,
        topology.data_rank,
        topology.data_size,
        topology.device,
        dtype,
    )


def evaluation_settings(run: ClassificationConfig | ProbingConfig, index: DatasetIndex, dtype: str) -> dict[str, Any]:
    """What :func:`evaluation_loader` shows of a set and the dtype that it is computed in, as settings of results."""
    return {
        "data": run.evaluation.data,
        "images": len(index),
        "image_size": run.model.image_size,
        "resize_size": run.evaluation.shorter_side(run.model.image_size),
        "squash": run.evaluation.squash,
        "dtype": dtype,
    }


def soft_cross_entropy(logits: Tensor, targets: Tensor | None, tensor: TensorGroup) -> Tensor:
    """Mean cross-entropy of a micro-batch's logits [B, C] with soft targets [B, C], or each tensor-parallel rank's
    share of them.
    """
    assert targets is not None
    if targets.shape[0] < logits.shape[0]:  # each tensor-parallel rank has loaded its share
        targets = gather_rows(targets, tensor)
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
