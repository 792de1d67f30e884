"""The pixels that a run's evaluation shows to its model, as a torchvision transform."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from megatron_nepa.checkpoint.described import Described
from megatron_nepa.config import CropConfig, EvaluationConfig, require
from megatron_nepa.data.index.headers import MODES


def evaluation_transform(described: Described, image_size: int, keeps_shape: bool) -> v2.Compose:
    """A PIL image or uint8 tensor [3, H, W] to fp32 [3, S, S] in [-1, 1]; a segmenter's keeps the image's shape.

    The geometry is the evaluation's to the pixel. The resize is torchvision's, bicubic (a segmenter's bilinear) with
    antialiasing, where the evaluation's is DALI's: most pixels are equal, some differ by a few grey levels.

    Args:
        described: model and settings; without a resize of its own the crop takes 7/8 of the shorter side.
        image_size: side S of the crop; where it is not the model's, the resize grows or shrinks with it.
        keeps_shape: whether the model is a segmenter.
    """
    settings, own = described.settings, described.model.image_size
    geometry: list[nn.Module]
    if keeps_shape:
        names = {entry.name for entry in fields(CropConfig)}
        crops = {name: settings[f"crops.{name}"] for name in names if f"crops.{name}" in settings}
        geometry = [ScaleInto(*CropConfig(**crops).scale(image_size))]
    else:
        squash = bool(settings.get("evaluation.squash"))
        shown = EvaluationConfig(resize_size=settings.get("evaluation.resize_size"), squash=squash)
        side = round(shown.shorter_side(own) * image_size / own)
        resize = v2.Resize([side, side] if squash else [side], v2.InterpolationMode.BICUBIC, antialias=True)
        geometry = [resize, v2.CenterCrop(image_size)]
    to_range = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3), v2.ToPureTensor()]
    return v2.Compose([Checked(), v2.RGB(), v2.ToImage(), *geometry, *to_range])


class Checked(nn.Module):
    """Let an image through if training would take it."""

    def forward(self, image: Any) -> Any:
        """A PIL image, tensor or array as it is.

        Raises:
            ConfigError: for something else, such as a path, and for pixels that training refuses: those of 16 bits.
        """
        require(
            isinstance(image, Image.Image | Tensor | np.ndarray),
            f"preprocess takes an image, not {type(image).__name__}: give PIL.Image.open(path), or uint8 [3, H, W].",
        )
        if isinstance(image, Image.Image):  # Pillow would cut 16 bits to 8 by making all that is brighter white
            require(image.mode in MODES, f"pixels of mode {image.mode} are not supported: make them 8-bit RGB first.")
        return image


class ScaleInto(nn.Module):
    """Scale an image, its shape kept, into a longer and a shorter side, as mmsegmentation's ``Resize(keep_ratio)``."""

    def __init__(self, longer: int, shorter: int) -> None:
        super().__init__()
        self.longer, self.shorter = longer, shorter

    def forward(self, image: Tensor) -> Tensor:
        """[C, H, W] to [C, h, w]."""
        sides = image.shape[-2:]
        factor = min(self.longer / max(sides), self.shorter / min(sides))
        size = [max(1, int(side * factor + 0.5)) for side in sides]
        scaled: Tensor = v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR, antialias=True)
        return scaled

    def extra_repr(self) -> str:
        """The two sides."""
        return f"longer={self.longer}, shorter={self.shorter}"
