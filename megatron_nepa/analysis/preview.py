"""The first samples of a run as training will see them, from the training pipeline itself."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_nepa.config import (
    ClassificationConfig,
    JepaObjective,
    MaeObjective,
    NepaObjective,
    PretrainingConfig,
    ProbingConfig,
    RunConfig,
    SegmentationConfig,
    require,
)
from megatron_nepa.data.decoding.masks import load_mask
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import open_image
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.loaders.classification import FinetuningLoader
from megatron_nepa.data.loaders.pretraining import Batch, PretrainingLoader
from megatron_nepa.data.loaders.segmentation import SegmentationLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import crop_boxes, flips
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.models.draws import patch_mask
from megatron_nepa.objectives.block_masks import block_masks
from megatron_nepa.objectives.mae import mae_mask
from megatron_nepa.tasks.probing import CROPS_ONLY
from megatron_nepa.tasks.segmentation_overlay import class_colours, coloured

Pixels = npt.NDArray[np.uint8]
_LEAST_WEIGHT = 0.04  # of a class in a soft target that is named


@dataclass(frozen=True)
class Sample:
    """A sample of the run.

    Attributes:
        number: k, counted from the start of the run.
        name: of its image.
        original: the stored image, uint8 [H, W, 3], its segmentation mask over it where there is one.
        box: x, y, width and height of the crop in it, None where the pipeline scales first.
        seen: what the model is given, uint8 [S, S, 3], likewise; masked patches are grey.
        target: what the sample is trained towards, and what was done to it, in words.
    """

    number: int
    name: str
    original: Pixels
    box: tuple[int, int, int, int] | None
    seen: Pixels
    target: str


def first_samples(run: RunConfig, index: DatasetIndex | Mixture, count: int) -> list[Sample]:
    """The first ``count`` samples of a run.

    Args:
        run: of any task.
        index: the run's images; a mixture of a pre-training run.
        count: how many.

    Raises:
        ConfigError: images that cannot serve the run.
    """
    require(count >= 1, f"--count is {count}; it must be at least 1.")
    batch = _first_batch(run, index, count)
    assert batch.image_index is not None
    pixels = batch.images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    numbers, samples = batch.image_index[:count].tolist(), np.arange(count)
    places = [_place(index, i) for i in numbers]
    originals = [_decoded(ImageStore(one), row) for one, row, _ in places]
    boxes: list[Any] = [None] * count
    targets = [_class_of(one, row) for one, row, _ in places]
    seen = [pixels[k] for k in range(count)]
    if isinstance(run, SegmentationConfig):
        assert isinstance(index, DatasetIndex)
        assert batch.labels is not None
        colours = class_colours(run.masks.num_classes)
        seen = [coloured(seen[k], batch.labels[k].numpy(), colours) for k in range(count)]
        originals = [
            coloured(original, load_mask(index, i, run.masks), colours)
            for original, i in zip(originals, numbers, strict=True)
        ]
        targets = [_present(batch.labels[k].numpy()) for k in range(count)]
    else:
        width, height = np.asarray(index.width[numbers]), np.asarray(index.height[numbers])
        boxes = crop_boxes(run.seed, samples, width, height, run.data.crop_scale_min).tolist()
        if batch.labels is not None:
            assert isinstance(index, DatasetIndex)
            targets = [_soft(batch.labels[k].float().numpy(), index.classes) for k in range(count)]
        if isinstance(run, PretrainingConfig):
            seen = _masked(run, seen, samples)
    mirrored = flips(run.seed, samples) if run.data.horizontal_flip or isinstance(run, SegmentationConfig) else None
    return [
        Sample(
            number=k,
            name=places[k][2] + places[k][0].names[places[k][1]],
            original=originals[k],
            box=None if boxes[k] is None else tuple(boxes[k]),
            seen=seen[k],
            target=", ".join(filter(None, (targets[k], "mirrored" if mirrored is not None and mirrored[k] else ""))),
        )
        for k in range(count)
    ]


def _place(index: DatasetIndex | Mixture, image: int) -> tuple[DatasetIndex, int, str]:
    """The set that an image is of, its number there, and what its name begins with."""
    if not isinstance(index, Mixture):
        return index, image, ""
    source, row = index.locate(image)
    return index.sources[source].index, row, f"{index.sources[source].name}: "


def _first_batch(run: RunConfig, index: DatasetIndex | Mixture, count: int) -> Batch:
    """The first micro-batch of one rank, of at least ``count`` samples, on the CPU."""
    group = run.augmentation.mix_group if isinstance(run, ClassificationConfig) else 1
    size = -(-count // group) * group
    feed = Feed(Share(size, size, 1, 0, 1, 0, 1), run.seed, torch.device("cpu"), torch.float32)
    loader: PretrainingLoader | FinetuningLoader | SegmentationLoader
    side = run.model.image_size
    if isinstance(index, Mixture):
        loader = PretrainingLoader(index, run.data, side, feed)
    elif isinstance(run, SegmentationConfig):
        loader = SegmentationLoader(index, run.data, run.crops, run.masks, side, feed)
    elif isinstance(run, ProbingConfig):
        loader = FinetuningLoader(index, run.data, CROPS_ONLY, side, index.num_classes, feed)
    elif isinstance(run, ClassificationConfig):
        classes = run.head.num_classes or index.num_classes
        loader = FinetuningLoader(index, run.data, run.augmentation, side, classes, feed)
    else:
        loader = PretrainingLoader(index, run.data, side, feed)
    try:
        return next(iter(loader))
    finally:
        loader.close()


def _decoded(store: ImageStore, image: int) -> Pixels:
    with open_image(io.BytesIO(store.read(image).tobytes())) as opened:
        return np.asarray(opened.convert("RGB"))


def _masked(run: PretrainingConfig, seen: list[Pixels], samples: npt.NDArray[np.int64]) -> list[Pixels]:
    """The pictures with the patches in grey that the trunk does not see."""
    grid, patch = run.model.grid_size, run.model.patch_size
    numbers = torch.from_numpy(samples)
    match run.objective:
        case NepaObjective(mask_ratio=ratio) if ratio > 0:
            mask = patch_mask(ratio, grid * grid, run.seed, numbers)
        case MaeObjective():
            mask = mae_mask(run.objective, grid * grid, run.seed, numbers)
        case JepaObjective():
            step = int(samples[0]) // run.global_batch_size
            context = block_masks(run.objective, (grid, grid), run.seed, step, numbers).context
            mask = torch.ones(len(samples), grid * grid, dtype=torch.bool).scatter_(1, context, False)
        case _:
            return seen
    covered = mask.view(-1, grid, grid).numpy().repeat(patch, axis=1).repeat(patch, axis=2)
    return [np.where(cover[..., None], np.uint8(128), pixels) for cover, pixels in zip(covered, seen, strict=True)]


def _class_of(index: DatasetIndex, image: int) -> str:
    label = int(index.label[image])
    return "" if label < 0 else _name(label, index.classes)


def _name(label: int, classes: tuple[str, ...]) -> str:
    return classes[label] if label < len(classes) else f"class {label}"


def _soft(target: npt.NDArray[np.float32], classes: tuple[str, ...]) -> str:
    """The classes of a soft target that are more than its smoothing."""
    named = [i for i in np.argsort(-target, kind="stable")[:2].tolist() if target[i] > _LEAST_WEIGHT]
    return " + ".join(f"{target[i]:.2f} {_name(i, classes)}" for i in named)


def _present(labels: npt.NDArray[np.int64]) -> str:
    found = np.setdiff1d(np.unique(labels), [255])
    return f"{len(found)} classes in {(labels != 255).mean():.0%} of the pixels"
