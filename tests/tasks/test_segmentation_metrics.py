"""Scores against a count pixel by pixel, and over ranks; pictures of predictions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megatron_nepa.tasks.segmentation_metrics import ConfusionMatrix, SegmentationScores, class_table
from megatron_nepa.tasks.segmentation_overlay import class_colours, write_overlay
from tests.distributed.ranks import run_ranks

CLASSES, CPU = 5, torch.device("cpu")


def example(image: int) -> tuple[Tensor, Tensor]:
    """Labels and predictions of one image: class 4 occurs nowhere, class 3 in predictions only."""
    generator = torch.Generator().manual_seed(image)
    shape = (6 + image, 7)
    labels = torch.randint(0, 3, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = 255
    return labels, torch.randint(0, 4, shape, generator=generator)


def scores_of(images: range, group: dist.ProcessGroup | None = None) -> SegmentationScores:
    matrix = ConfusionMatrix(CLASSES, CPU)
    for image in images:
        matrix.add(*example(image))
    return matrix.scores(group)


def test_scores_equal_a_brute_force_count() -> None:
    pairs = [
        (int(label), int(prediction))
        for image in range(7)
        for label, prediction in zip(*(x.flatten() for x in example(image)), strict=True)
        if label != 255
    ]
    scores = scores_of(range(7))
    ious, accuracies = [], []
    for k in range(CLASSES):
        both = sum(1 for label, prediction in pairs if label == k and prediction == k)
        either = sum(1 for label, prediction in pairs if k in (label, prediction))
        labelled = sum(1 for label, _ in pairs if label == k)
        assert scores.labelled[k] == labelled
        if either:
            ious.append(both / either)
            assert scores.iou[k] == ious[-1]
        else:
            assert math.isnan(scores.iou[k])
        if labelled:
            accuracies.append(both / labelled)
            assert scores.accuracy[k] == accuracies[-1]
        else:
            assert math.isnan(scores.accuracy[k])
    assert (len(ious), len(accuracies)) == (4, 3)
    assert math.isclose(scores.mean_iou, sum(ious) / 4)
    assert math.isclose(scores.mean_accuracy, sum(accuracies) / 3)
    assert scores.pixel_accuracy == sum(1 for label, prediction in pairs if label == prediction) / len(pairs)


def test_nothing_counted_is_no_score() -> None:
    scores = ConfusionMatrix(CLASSES, CPU).scores()
    assert math.isnan(scores.mean_iou)
    assert math.isnan(scores.mean_accuracy)
    assert math.isnan(scores.pixel_accuracy)


def share_scores() -> SegmentationScores:
    """Every other image on each of two ranks; 7 images, so one rank counts one more."""
    assert dist.group.WORLD is not None
    return scores_of(range(dist.get_rank(), 7, 2), dist.group.WORLD)


def test_ranks_count_as_one() -> None:
    expected = scores_of(range(7))
    for scores in run_ranks(2, share_scores):
        for name in ("correct", "labelled", "predicted"):
            assert np.array_equal(getattr(scores, name), getattr(expected, name))


def test_table_lists_classes_by_size() -> None:
    counts = np.array([10, 30, 0]), np.array([20, 60, 0]), np.array([20, 50, 0])
    lines = class_table(SegmentationScores(*counts), ["cat", "sky", "dog"]).splitlines()
    assert lines[2:] == [
        "| sky | 75.00 | 37.50 | 50.00 |",
        "| cat | 25.00 | 33.33 | 50.00 |",
        "| dog | 0.00 | - | - |",
    ]


def test_overlay_shows_the_classes(tmp_path: Path) -> None:
    """Every class keeps its colour, prediction and labels differ where they differ, and a second write replaces."""
    colours = class_colours(150)
    assert len(np.unique(colours, axis=0)) == 150
    assert np.array_equal(class_colours(3), colours[:3])
    image = np.full((40, 60, 3), 128, np.uint8)
    labels = np.zeros((40, 60), np.int64)
    labels[:, 30:], labels[:5] = 1, 255
    path = tmp_path / "overlay.png"
    for prediction in (labels * 0, labels * 0 + 1):
        write_overlay(path, image, labels, prediction, ["one", "two"])
    assert [file.name for file in tmp_path.iterdir()] == ["overlay.png"]
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)

    def area(number: int) -> int:
        mixed = 0.4 * 128 + 0.6 * colours[number].astype(float)
        return int((np.abs(pixels - mixed).max(1) <= 2).sum())

    # of the labels 35 rows of 30 columns are class 0 and as many class 1; the prediction is class 1 all over
    assert 0.8 < area(1) / area(0) / (1 + 40 * 60 / (35 * 30)) < 1.2
