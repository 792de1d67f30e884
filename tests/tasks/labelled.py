"""A small labelled image folder, and a fine-tuning run on it inside a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.runs import call_script

CLASSES = ("blue", "green", "red")
TINY = [
    "--model.image_size=32",
    "--model.patch_size=8",
    "--model.hidden_size=32",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--model.mlp_hidden_size=48",
    "--model.position_embedding=none",
    "--model.layer_scale_init=0.5",
    "--global_batch_size=12",
    "--micro_batch_size=6",
    "--augmentation.mix_group=2",
    "--augmentation.workers=0",
    "--evaluation.resize_size=32",
    "--evaluation.batch_size=4",
    "--dtype=fp32",
    "--data.num_threads=1",
]


def make_labelled(folder: Path, per_class: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """An ImageFolder tree of noisy images, each class of its own colour."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            generator = np.random.default_rng(100 * number + i)
            image = generator.normal(60, 50, (40, 48, 3))
            image[..., 2 - number % 3] += 40
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:03}.jpg", quality=90)
    return folder


def finetune(arguments: list[str]) -> str | None:
    """Call the classification script's main function on this rank; None, or the error that a user would see."""
    from examples.finetune_classification import main

    return call_script(main, arguments)
