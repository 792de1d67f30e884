"""Evaluating a segmenter over a whole validation set: scores, a table of the classes, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from megatron_nepa.config import SegmentationConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.pairs import class_names
from megatron_nepa.data.loaders.evaluation import decode_all
from megatron_nepa.data.loaders.segmentation import SegmentationImage, evaluate_segmentation
from megatron_nepa.files import replace_text
from megatron_nepa.models.sliding_window import sliding_window_logits, whole_image_logits
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.models.upernet import resize
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.tasks.segmentation_metrics import ConfusionMatrix, class_table
from megatron_nepa.tasks.segmentation_overlay import write_overlay


class SegmentationEvaluator:
    """mIoU and its kin over every image once, one image at a time, so that any number of ranks finds the same numbers.

    Logits are computed at the scaled image's size, resized to the image's own, and scored there, as mmsegmentation
    does. Beside the results it writes ``OUTPUT_DIR/segmentation/classes.md`` and some overlays, of the weights that
    were evaluated last.

    Args:
        run: the config.
        index: validation pairs.
        topology: this rank's place.
        every: steps between evaluations.

    Raises:
        ConfigError: class names that do not fit the number of classes.
    """

    prefix = "val_"
    best = "mean_iou"
    at_start = False

    def __init__(self, run: SegmentationConfig, index: DatasetIndex, topology: Topology, every: int) -> None:
        self.run, self.index, self.topology, self.every = run, index, topology, every
        self.names = class_names(index.folder, run.masks)
        self.folder = Path(run.output_dir) / "segmentation"
        count = min(run.evaluation.overlays, len(index))
        self.drawn = set(np.linspace(0, len(index) - 1, count).astype(int).tolist())

    def decode_all(self, interrupted: Callable[[], bool]) -> None:
        """Read this rank's validation images and masks once."""
        decode_all(self._images(), interrupted)

    def evaluate(self, model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Scores in [0, 1]: mean_iou, mean_accuracy, pixel_accuracy."""
        run, topology = self.run, self.topology
        matrix = ConfusionMatrix(run.masks.num_classes, topology.device)
        count = -(-len(self.index) // topology.data_size)
        shown = None if topology.is_main else True  # None: where there is a terminal
        for item in tqdm(self._images(), "evaluating", count, unit=" images", leave=False, disable=shown):
            if interrupted():
                return None
            logits = resize(self._logits(model, item.images), item.labels.shape)
            predictions = logits.argmax(1)[0]
            if item.valid:
                matrix.add(item.labels, predictions)
                if item.image_index in self.drawn and topology.tensor.rank == 0:
                    self._draw(item, predictions)
        scores = matrix.scores(topology.data_group)
        if topology.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / "classes.md", class_table(scores, self.names))
        return {
            "mean_iou": scores.mean_iou,
            "mean_accuracy": scores.mean_accuracy,
            "pixel_accuracy": scores.pixel_accuracy,
        }

    def _images(self) -> Iterator[SegmentationImage]:
        """This rank's share of the validation images, scaled, with their masks."""
        run, topology = self.run, self.topology
        return evaluate_segmentation(
            self.index,
            run.data,
            run.crops,
            run.masks,
            run.model.image_size,
            topology.data_rank,
            topology.data_size,
            topology.device,
            DTYPES[run.dtype],
        )

    def _logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """fp32 [1, K, H, W] of a scaled image [1, 3, H, W]."""
        run = self.run
        sample = torch.zeros(1, dtype=torch.int64, device=image.device)

        def logits(window: Tensor) -> Tensor:
            return cast("Tensor", model(window, sample)).float()

        if run.evaluation.inference == "whole":
            return whole_image_logits(logits, image, run.model.patch_size)
        return sliding_window_logits(logits, image, run.model.image_size, run.window_stride)

    def _draw(self, item: SegmentationImage, predictions: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        image = resize(item.images.float(), item.labels.shape)[0].permute(1, 2, 0)
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        name = Path(self.index.names[item.image_index]).stem
        labels, classes = item.labels.cpu().numpy(), predictions.cpu().numpy()
        write_overlay(self.folder / f"{name}.png", pixels.cpu().numpy(), labels, classes, self.names)
