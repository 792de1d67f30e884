"""What the training code computes of weights, to compare an export with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nepa.checkpoint.reading.modules import build_module, head_of
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import ConfigError, ModelConfig


class Evaluated(NamedTuple):
    """Results of the training code in fp32.

    Attributes:
        tokens: after the final LayerNorm, [B, T, D].
        logits: of a classifier, [B, C], or None.
    """

    tokens: Tensor
    logits: Tensor | None


@torch.no_grad()
def evaluate_weights(weights: Weights, images: Tensor) -> Evaluated:
    """The features and logits of images [B, 3, H, W] in evaluation."""
    numbers = torch.arange(len(images))
    output = build_module(weights, "none")(images, numbers)
    has_classifier = head_of(weights) == "classes"
    logits = build_module(weights, "classes")(images, numbers) if has_classifier else None
    return Evaluated(output.output.unflatten(0, (len(images), -1)), logits)


def sample_images(model: ModelConfig, count: int) -> Tensor:
    """The same random images in [-1, 1] every time, fp32 [count, 3, S, S]."""
    side = model.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def require_equal(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> float:
    """Refuse an export that computes something else.

    Args:
        found: by the export.
        wanted: by the training code.
        tolerance: largest difference, relative to the largest value.
        what: the export, for the message.

    Returns:
        The largest relative difference.

    Raises:
        ConfigError: where it is larger than ``tolerance``, not a number, or of another shape.
    """
    apart = float("nan")
    if found.shape == wanted.shape:
        scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)  # a head before training gives zeros
        apart = ((found - wanted).abs().max() / scale).item()
    if not apart <= tolerance:
        raise ConfigError(
            f"{what} differs from the training code by {apart:.2g} of the largest value: nothing written."
        )
    return apart
