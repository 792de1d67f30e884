"""What a trunk that was trained on pixels makes of an image that it sees in part: MAE's masks, AIM's prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_nepa.analysis.images import Pixels, to_tensor
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import AimObjective, MaeObjective, read_objective
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.aim import AimForPretraining
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.objectives.pixels import PixelModel
from megatron_nepa.training.reporting.plot_style import GREY, STYLE, save_figure

_PANEL = 2.6  # side of a panel, inches
_HIDDEN, _DARK, _LIGHT = np.uint8(128), np.uint8(20), np.uint8(235)
_STYLE: dict[Any, Any] = {**STYLE, "axes.grid": False}


def describe_task(model: PixelModel) -> str:
    """What the model predicts, in words."""
    if isinstance(model, AimForPretraining):
        return "the pixels of each patch after the prefix, from all before it"
    return "the pixels of the patches that the trunk does not see"


def pixel_model(checkpoint: Path, weights: Weights) -> PixelModel | None:
    """The model that a checkpoint's run trained to predict pixels, in evaluation mode; None where it is another.

    Args:
        checkpoint: of this project, or an OUTPUT_DIR; anything else has no such model.
        weights: of that checkpoint.
    """
    names = {name.partition(".")[0] for name in weights.tensors}
    if not names & {"pixel_decoder", "pixel_head"} or checkpoint.is_file():
        return None
    run = read_manifest(find_checkpoint(str(checkpoint)))["run"]
    objective = read_objective(run)
    if not isinstance(objective, AimObjective | MaeObjective):
        return None
    model = build_objective(weights.model, objective, Build(seed=run["seed"]))
    assert isinstance(model, PixelModel)
    model.load_state_dict(weights.tensors)
    return model.eval()


@torch.no_grad()
def draw_reconstruction(path: Path, model: PixelModel, pixels: Pixels, headline: str) -> None:
    """Draw what the trunk sees of an image, what is hidden from it, what the model predicts there, and the original.

    The hidden patches are those of the run's first sample.

    Args:
        path: PNG file.
        model: of :func:`pixel_model`.
        pixels: the image, uint8 [S, S, 3], of the model's size.
        headline: at the top.
    """
    is_aim = isinstance(model, AimForPretraining)  # whose trunk has seen every patch before the one that it predicts
    patch = model.trunk.config.patch_size
    grid = pixels.shape[0] // patch
    found = model.reconstruct(to_tensor(pixels), torch.zeros(1, dtype=torch.int64))
    parts = found.patches[0].view(grid, grid, 3, patch, patch).permute(0, 3, 1, 4, 2)  # [h, p, w, p, C]
    predicted = parts.reshape(pixels.shape).mul(127.5).add(127.5).round().clamp(0, 255).byte().numpy()
    hidden = found.hidden[0].view(grid, grid).numpy().repeat(patch, axis=0).repeat(patch, axis=1)[..., None]
    panels = (
        ("prefix" if is_aim else "what the trunk sees", np.where(hidden, _HIDDEN, pixels)),
        (
            f"{'predicted' if is_aim else 'hidden'}: {found.hidden[0].float().mean():.0%}",
            np.where(hidden, _LIGHT, _DARK).repeat(3, axis=2),
        ),
        ("prediction", predicted),
        ("original", pixels),
    )
    with rc_context(_STYLE):
        figure = Figure(figsize=(_PANEL * len(panels), _PANEL + 0.75), layout="constrained")
        title, *rest = headline.splitlines()
        figure.suptitle(title, fontsize=11, fontweight="bold")
        for axes, (name, image) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axes.imshow(image)
            axes.set_title(name, fontsize=9, fontweight="normal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        figure.supxlabel("\n".join(rest), fontsize=8, color=GREY)
        save_figure(figure, path)
