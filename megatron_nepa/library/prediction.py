"""Predictions on images without labels: the most probable classes as a table, or masks as pictures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_nepa.config import require
from megatron_nepa.files import whole_or_absent
from megatron_nepa.library.model import NepaModel
from megatron_nepa.library.outputs import require_writable
from megatron_nepa.library.pictures import Pictures
from megatron_nepa.models.upernet import resize
from megatron_nepa.tasks.segmentation_overlay import Pixels, class_colours, coloured


@torch.no_grad()
def predict_classes(
    model: NepaModel,
    pictures: Pictures,
    out: Path,
    top: int,
    batch_size: int,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Write a row an image: its name, and its most probable classes with their probabilities.

    A class without a name is its number. The file appears in one piece.

    Args:
        model: a classifier.
        pictures: to look at.
        out: ``.csv`` (columns file, class, probability, class_2, probability_2, ...) or ``.jsonl`` (file and a list of
            {class, probability}).
        top: classes of a row.
        batch_size: images computed at once.
        threads: that decode.
        advance: told of images that are done.

    Raises:
        ConfigError: the model has no classifier, ``out`` exists, has another ending or cannot be written, or an image
            cannot be read.
    """
    require(out.suffix in (".csv", ".jsonl"), f"{out} must end in .csv or .jsonl, which say the format.")
    require(not out.exists(), f"{out} exists: choose another name for the result.")
    require(top >= 1, f"--top is {top}; it must be at least 1.")
    require_writable(out.parent)
    device = model.trunk.norm.weight.device

    def rows() -> Iterator[tuple[str, list[tuple[str, float]]]]:
        first = 0
        for batch in pictures.batches(range(len(pictures.names)), batch_size, model.preprocess, threads):
            probability = model.classify(torch.stack(batch).to(device)).softmax(-1).cpu()
            best = probability.topk(min(top, probability.shape[1]), dim=-1)
            for i, (values, numbers) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                named = [model.classes[n] if model.classes else str(n) for n in numbers]
                yield pictures.names[first + i], list(zip(named, values, strict=True))
            first += len(batch)
            advance(len(batch))

    with (
        whole_or_absent(out) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        (_write_csv if out.suffix == ".csv" else _write_json_lines)(file, rows())


@torch.no_grad()
def predict_masks(
    model: NepaModel, pictures: Pictures, out: Path, threads: int, advance: Callable[[int], None]
) -> None:
    """Write for every image ``NAME.png``, a palette image whose values are the classes, and ``NAME.overlay.jpg``.

    Both have the image's own size; folders below the source are kept. Images whose mask is there already are passed
    over, so that a stopped command continues.

    Args:
        model: a segmenter.
        pictures: to look at.
        out: the folder of the masks.
        threads: that decode.
        advance: told of images that are done.

    Raises:
        ConfigError: the model has no decoder, two images would get one mask, ``out`` cannot be written, or an image
            cannot be read.
    """
    targets = [_mask_path(out, pictures.names[i]) for i in range(len(pictures.names))]
    doubles = [target for target, count in Counter(targets).items() if count > 1]
    require(not doubles, f"several images would get one mask, {doubles[:1]} first: give them other names.")
    require_writable(out)
    device = model.trunk.norm.weight.device
    waiting = [i for i, target in enumerate(targets) if not target.exists()]
    advance(len(targets) - len(waiting))

    def stored_and_scaled(image: Image.Image) -> tuple[Pixels, Tensor]:
        return np.asarray(image), model.preprocess(image)

    for i, ((image, scaled),) in zip(waiting, pictures.batches(waiting, 1, stored_and_scaled, threads), strict=True):
        logits = model.segment(scaled[None].to(device))
        classes = resize(logits, image.shape[:2]).argmax(1)[0].to(torch.uint8).cpu()
        _write_mask(targets[i], image, classes, logits.shape[1])
        advance(1)


def _mask_path(out: Path, name: str) -> Path:
    parts = [part for part in Path(name).parts if part not in ("/", "..")]
    return out.joinpath(*parts).with_suffix(".png")


def _write_mask(target: Path, image: Pixels, classes: Tensor, num_classes: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    colours = class_colours(num_classes)
    overlay = Image.fromarray(coloured(image, classes.numpy(), colours))
    overlay.save(target.with_suffix(".overlay.jpg"), quality=90)
    mask = Image.fromarray(classes.numpy(), "P")
    mask.putpalette(colours.tobytes())
    with whole_or_absent(target) as partial:  # last: a mask that is there has its overlay
        mask.save(partial, format="PNG")


def _write_csv(file: TextIO, rows: Iterator[tuple[str, list[tuple[str, float]]]]) -> None:
    writer = csv.writer(file)
    for number, (name, found) in enumerate(rows):
        if number == 0:
            ranks = ["", *(f"_{place}" for place in range(2, len(found) + 1))]
            writer.writerow(["file", *(f"{column}{rank}" for rank in ranks for column in ("class", "probability"))])
        writer.writerow([name, *(value for label, share in found for value in (label, f"{share:.6f}"))])


def _write_json_lines(file: TextIO, rows: Iterator[tuple[str, list[tuple[str, float]]]]) -> None:
    for name, found in rows:
        classes = [{"class": label, "probability": round(share, 6)} for label, share in found]
        file.write(json.dumps({"file": name, "classes": classes}, ensure_ascii=False) + "\n")
