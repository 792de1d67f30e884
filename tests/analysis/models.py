"""A small trunk, its weights and an image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from skimage import data as photographs
from torch import Tensor

from megatron_nepa.checkpoint.reading.weights import Weights, write_state
from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.nepa import NepaForPretraining

MODEL = ModelConfig(
    image_size=56,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    mlp="gelu",
    mlp_hidden_size=48,
    qk_norm="affine",
    position_embedding="none",
    bos_token=True,
    layer_scale_init=0.5,
    init_std=0.2,
)
PHOTOGRAPH = photographs.astronaut()


def build(model: ModelConfig = MODEL, seed: int = 0) -> NepaForPretraining:
    return NepaForPretraining(model, build=Build(seed=seed)).eval()


def weights_of(nepa: NepaForPretraining) -> Weights:
    tensors = {name: param.detach() for name, param in nepa.named_parameters()}
    return Weights(nepa.trunk.config, tensors, "weights of a test")


def pixels_of(rows: int, columns: int) -> np.ndarray:
    """An image of so many patches, uint8 [H, W, 3]."""
    return PHOTOGRAPH[40 : 40 + 14 * rows, 100 : 100 + 14 * columns].copy()


def write_run(folder: Path, steps: list[int]) -> dict[int, dict[str, dict[str, Tensor]]]:
    """An OUTPUT_DIR with checkpoints; returns the "raw" and "ema" weights of each step."""
    written = {}
    for step in steps:
        kinds = {kind: weights_of(build(seed=step + i)).tensors for i, kind in enumerate(("raw", "ema"))}
        written[step] = kinds
        state = {f"master.{name}": value for name, value in kinds["raw"].items()}
        state |= {f"ema.{name}": value for name, value in kinds["ema"].items()}
        description = {"has_optimizer": True, "has_ema": True, "run": {"model": asdict(MODEL)}}
        path = folder / f"checkpoints/step_{step:08}"
        write_state(path, state, MODEL, {"progress": asdict(Progress(step)), **description})
        (folder / "checkpoints/latest").write_text(path.name)
    return written
