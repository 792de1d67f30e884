"""Fine-tuning to semantic segmentation as a task of the shared loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_nepa.config import DataConfig, SegmentationConfig, require
from megatron_nepa.data.decoding.masks import check_masks
from megatron_nepa.data.decoding.timed_settings import Decoded
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.pairs import class_names, pair_index
from megatron_nepa.data.loaders.pretraining import Batch
from megatron_nepa.data.loaders.segmentation import SegmentationLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.flops import train_flops
from megatron_nepa.models.segmenter import Decoder, SegmentationOutput, Segmenter
from megatron_nepa.parallel.batch_norm import BatchNorm
from megatron_nepa.parallel.rows import holds_whole_samples
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.tasks.segmentation_evaluation import SegmentationEvaluator
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.reporting.waiting import waiting_for
from megatron_nepa.training.task import Task


class SegmentationTask(Task):
    """UPerNet on a trunk.

    Args:
        run: the config.
        topology: this rank's place.

    Raises:
        ConfigError: for data that cannot serve the run.
    """

    def __init__(self, run: SegmentationConfig, topology: Topology) -> None:
        self.run = run
        self.topology = topology
        self.reset_head = run.reset_head
        evaluation, data = run.evaluation, run.data
        validation = None
        if evaluation.data is not None:
            validation = _pairs(run, evaluation.data, "validation", 0.0, topology)
        # an evaluation alone needs no training data
        allowed = data.max_bad_share if data.on_bad_image == "skip" else 0.0
        index = validation if evaluation.only else _pairs(run, data.path, "training", allowed, topology)
        assert index is not None
        self.index = index
        self.classes = index.classes
        self.num_images = len(index)
        self.data_fingerprint = index.fingerprint()
        self.flops_per_image = float(train_flops(run.model) + decoder_train_flops(run))
        self.evaluator: SegmentationEvaluator | None = None
        if validation is not None:
            every = evaluation.every or max(1, round(len(index) / run.global_batch_size))
            self.evaluator = SegmentationEvaluator(run, validation, topology, every)

    def build_model(self, kernels: Kernels) -> nn.Module:
        """The model, drawn from the run's seed."""
        run, topology = self.run, self.topology
        # BatchNorm sees each sample of all replicas' micro-batches once
        shares = holds_whole_samples(run.micro_batch_size, topology.tensor, run.parallel.sequence_parallel)
        new_norm = partial(BatchNorm, group=torch.distributed.group.WORLD if shares else topology.data_group)
        build = Build.of(run, topology.tensor, kernels)
        return Segmenter(run.model, run.masks.num_classes, build, new_norm)

    def build_loader(self, feed: Feed, data: DataConfig) -> SegmentationLoader:
        """This rank's micro-batches."""
        run = self.run
        return SegmentationLoader(self.index, data, run.crops, run.masks, run.model.image_size, feed)

    def decoded(self) -> Decoded:
        """Whole images."""
        return Decoded(self.index, self.run.model.image_size, self.topology.device, scale_min=1.0)

    def learning_rates(self, total_steps: int) -> LearningRates:
        """Layer-wise decayed rates; the neck and heads have the run's own."""
        return LearningRates(self.run, total_steps, self.run.layer_decay)

    def forward(self, engine: TrainingEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch."""
        output: SegmentationOutput = engine.forward(batch.images, batch.sample_index, batch.labels)
        parts = dict(zip(("head_loss", "auxiliary_loss", "pixel_accuracy"), output.parts, strict=True))
        return output.loss, {"loss": output.loss.detach(), **parts}

    def evaluation_settings(self) -> dict[str, Any]:
        """The images, how they are scaled and shown, and what their masks mean."""
        run = self.run
        assert self.evaluator is not None
        longer, shorter = run.crops.scale(run.model.image_size)
        sliding = run.evaluation.inference == "slide"
        return {
            "data": run.evaluation.data,
            "images": len(self.evaluator.index),
            "image_size": run.model.image_size,
            "longer_side": longer,
            "shorter_side": shorter,
            "inference": run.evaluation.inference,
            "stride": run.window_stride if sliding else None,
            "num_classes": run.masks.num_classes,
            "reduce_zero_label": run.masks.reduce_zero_label,
            "dtype": run.dtype,
        }


def decoder_train_flops(run: SegmentationConfig) -> int:
    """Model FLOPs of the neck and heads in one image's share of a training step, three times the forward pass's."""
    model = run.model
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder = Decoder(model.hidden_size, run.masks.num_classes, BatchNorm, run.seed).eval()
        decoder([torch.empty(1, model.hidden_size, model.grid_size, model.grid_size)] * 4, torch.zeros(1))
    return 3 * int(counter.get_total_flops())


def _pairs(
    run: SegmentationConfig, path: str | None, split: str, allowed_share: float, topology: Topology
) -> DatasetIndex:
    require(path is not None, "segmentation needs image and mask pairs: give --data (a folder or an index of pairs).")
    assert path is not None
    with waiting_for(f"reading the headers of the {split} images and masks in {path}", topology.is_main):
        index = pair_index(path, split, verbose=topology.is_main)
    sides = np.minimum(index.width, index.height)
    smallest = int(sides.argmin())
    require(
        int(sides[smallest]) >= run.model.patch_size,
        f"{index.where(smallest)} is {index.width[smallest]} x {index.height[smallest]} pixels, smaller than a patch "
        f"of model.patch_size {run.model.patch_size}: take it out.",
    )
    with waiting_for(f"checking the values of some {split} masks", topology.is_main):
        said = check_masks(index, run.masks, allowed_share, class_names(index.folder, run.masks))
    if said and topology.is_main:
        print(f"{split} masks of {said}")
    return index
