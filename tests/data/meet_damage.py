"""Trains and evaluates on images that are damaged after they were indexed: a process of its own, which may crash.

python meet_damage.py FOLDER FIRST_SEED SEEDS
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from damage import DAMAGES, HEIGHT, WIDTH, cut, formats
from PIL import Image

from megatron_nepa.config import AugmentationConfig, ConfigError, CropConfig, DataConfig, MaskConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.classification import FinetuningLoader
from megatron_nepa.data.loaders.evaluation import EvaluationLoader
from megatron_nepa.data.loaders.pretraining import PretrainingLoader
from megatron_nepa.data.loaders.segmentation import SegmentationLoader, evaluate_segmentation
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import image_of_sample
from megatron_nepa.data.sampling.rank_share import Share

SIDE, SEED, CPU = 32, 5, torch.device("cpu")
# micro-batches of more than 4 x (threads + 1) images: DALI parses them in its threads and beside them
SHARE, MICRO_BATCHES = Share(32, 32, 1, 0, 1, 0, 1), 2
COPIES = 3  # of each format
CONFIG, PLAIN = DataConfig(max_bad_share=1.0), AugmentationConfig(None, 0.0, 0.0, 0.0, label_smoothing=0.0)
CROPS, MASKS = CropConfig(shorter_side=48, longer_side=96), MaskConfig(num_classes=3, reduce_zero_label=False)


def write_folder(folder: Path) -> DatasetIndex:
    """Good images of every format, their masks, and an index of the pairs."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for copy in range(COPIES):
        for name, content in formats(copy).items():
            (images / f"{copy}_{name}").write_bytes(content)
    found = scan_folder(images)
    assert not found.quarantine
    labels = np.random.default_rng(0).integers(0, 3, (HEIGHT // 8, WIDTH // 8), dtype=np.uint8)
    for name in found.names:
        Image.fromarray(labels).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST).save(masks / f"{name}.png")
    return replace(
        found,
        root=folder,
        names=PackedNames.pack(f"images/{name}" for name in found.names),
        masks=PackedNames.pack(f"masks/{name}.png" for name in found.names),
        label=np.zeros(len(found), np.int32),
    )


def train(index: DatasetIndex, kind: str, log: Path | None = None) -> tuple[torch.Tensor, int]:
    """The images of some micro-batches of a kind of training, and how many were replaced."""
    feed = Feed(SHARE, SEED, CPU, torch.float32, bad_image_log=log)
    loader: PretrainingLoader | FinetuningLoader | SegmentationLoader
    if kind == "pretraining":
        loader = PretrainingLoader(index, CONFIG, SIDE, feed)
    elif kind == "finetuning":
        loader = FinetuningLoader(index, CONFIG, PLAIN, SIDE, 2, feed)
    else:
        loader = SegmentationLoader(index, CONFIG, CROPS, MASKS, SIDE, feed)
    images = torch.cat([batch.images for batch in islice(loader, MICRO_BATCHES)])
    replaced = loader.num_bad_images
    loader.close()
    return images, replaced


def train_on_damage(index: DatasetIndex, bad: list[int], kind: str, expected: torch.Tensor) -> Iterator[str]:
    """What goes wrong in a kind of training where the images ``bad`` are damaged."""
    log = index.root / f"{kind}.jsonl"
    seen, replaced = train(index, kind, log)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if len(rows) < replaced:  # reading ahead may add one yet
        yield f"{kind} recorded {len(rows)} of {replaced} replacements"
    if not {row["image"] for row in rows} <= set(bad):
        yield f"{kind} replaced a good image"
    good = torch.from_numpy(~np.isin(image_of_sample(SEED, np.arange(len(seen)), len(index)), bad))
    if not torch.equal(seen[good], expected[good]):
        yield f"{kind} changed the pixels of good images"


def evaluate_on_damage(index: DatasetIndex, bad: list[int]) -> Iterator[str]:
    """What goes wrong in evaluations, which pass where an image decodes all the same, or name a damaged one."""
    evaluations: list[Callable[[], Iterator[object]]] = [
        lambda: iter(EvaluationLoader(index, CONFIG, SIDE, 40, False, 32, 0, 1, CPU, torch.float32)),
        lambda: evaluate_segmentation(index, CONFIG, CROPS, MASKS, SIDE, 0, 1, CPU, torch.float32),
    ]
    for run in evaluations:
        try:
            for _ in run():
                pass
        except ConfigError as error:
            if not any(index.names[image] in str(error) for image in bad):
                yield f"an evaluation was refused without the name of a damaged image: {error}"


def main(folder: Path, first: int, count: int) -> int:
    """Damage a few images anew for each seed; print the seeds, and what went wrong with each."""
    good, failures = write_folder(folder / "good"), 0
    expected = {kind: train(good, kind)[0] for kind in ("pretraining", "finetuning", "segmentation")}
    for seed in range(first, first + count):
        draw, index = random.Random(seed), replace(good, root=folder / str(seed))
        shutil.copytree(good.root, index.root)
        bad = draw.sample(range(len(index)), draw.randrange(2, 7))
        for image in bad:
            path = index.root / index.names[image]
            path.write_bytes(draw.choice(DAMAGES)(path.read_bytes(), draw))
        path = index.root / index.masks[bad[0]]
        path.write_bytes(cut(path.read_bytes(), draw))
        print(f"seed {seed}: {[index.names[image] for image in bad]}", flush=True)
        wrong = [message for kind in expected for message in train_on_damage(index, bad, kind, expected[kind])]
        wrong += evaluate_on_damage(index, bad)
        print(*wrong, sep="\n", flush=True)
        failures += len(wrong)
        shutil.rmtree(index.root)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
