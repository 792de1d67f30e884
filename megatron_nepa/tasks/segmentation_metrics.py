"""Segmentation scores of a whole data set from one confusion matrix (mmsegmentation's mIoU, mAcc and aAcc).

Ours rather than torchmetrics': the matrix is summed over the data-parallel ranks alone, once, and the few lines that
read it follow mmsegmentation's rule for classes that never occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import IGNORED

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SegmentationScores:
    """Pixel counts of every class, [K], and the scores in [0, 1] that follow; nan where no pixel decides.

    Attributes:
        correct: pixels whose label and prediction are the class.
        labelled: pixels whose label is.
        predicted: pixels whose prediction is, ignored ones left out.
    """

    correct: Counts
    labelled: Counts
    predicted: Counts

    @property
    def iou(self) -> Floats:
        """Intersection over union of each class, [K]."""
        return _ratio(self.correct, self.labelled + self.predicted - self.correct)

    @property
    def accuracy(self) -> Floats:
        """Share of each class's labelled pixels that are predicted, [K]."""
        return _ratio(self.correct, self.labelled)

    @property
    def mean_iou(self) -> float:
        """mIoU: mean over the classes that labels or predictions hold."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """mAcc: mean over the classes that labels hold."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """aAcc: share of all labelled pixels that are predicted right."""
        return float(_ratio(self.correct.sum(), self.labelled.sum()))


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over all pixels, ignored ones left out.

    Args:
        num_classes: K.
        device: where the counts are kept, so that no image waits for the host.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, labels: Tensor, predictions: Tensor) -> None:
        """Count one image or batch; both int64 of one shape, labels in [0, K) or 255, predictions in [0, K)."""
        known = labels != IGNORED
        pairs = (labels * self.num_classes + predictions)[known]
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def scores(self, group: dist.ProcessGroup | None = None) -> SegmentationScores:
        """Scores of the pixels that all ranks of ``group`` counted (None: this rank); integer sums, so exact."""
        counts = self.counts.clone()
        if group is not None:
            dist.all_reduce(counts, group=group)
        matrix = counts.cpu().numpy()
        return SegmentationScores(np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0))


def class_table(scores: SegmentationScores, names: Sequence[str]) -> str:
    """Markdown table of the classes, the largest first: share of the labelled pixels, IoU, accuracy, in percent."""
    share, iou, accuracy = _ratio(scores.labelled, scores.labelled.sum()), scores.iou, scores.accuracy
    rows = ["| class | pixels % | IoU % | accuracy % |", "|---|---:|---:|---:|"]
    for i in np.argsort(-scores.labelled, kind="stable"):
        rows.append(f"| {names[i]} | {_percent(share[i])} | {_percent(iou[i])} | {_percent(accuracy[i])} |")
    return "\n".join(rows) + "\n"


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.2f}"


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.divide(part, whole), np.float64)
