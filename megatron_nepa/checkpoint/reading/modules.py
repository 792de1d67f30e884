"""A checkpoint's weights in a module that computes them, on one rank and in evaluation mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import multiples_around, one_of, require
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.classifier import Classifier, Pooling
from megatron_nepa.models.resampling import resample_positions
from megatron_nepa.models.segmenter import Segmenter
from megatron_nepa.models.trunk import Trunk

Head = Literal["none", "classes", "masks"]
_HEADS: dict[Head, str] = {"classes": "classifier.weight", "masks": "decoder.head.classifier.weight"}
_POSITIONS = "trunk.embedding.positions"


def head_of(weights: Weights) -> Head:
    """What the weights' head gives: classes, masks, or none where there is a trunk alone."""
    return next((head for head, name in _HEADS.items() if name in weights.tensors), "none")


def at_image_size(weights: Weights, image_size: int | None) -> Weights:
    """The weights for square images of another size, to which learned positions are resampled.

    Args:
        weights: of any model.
        image_size: side in pixels; None keeps the model's.

    Raises:
        ConfigError: where the size is no multiple of the patch's.
    """
    model, patch = weights.model, weights.model.patch_size
    if image_size is None or image_size == model.image_size:
        return weights
    require(
        image_size % patch == 0 and image_size >= patch,
        f"image_size {image_size} is not a multiple of the patch's side {patch}: take "
        f"{one_of(multiples_around(image_size, patch))}.",
    )
    tensors = dict(weights.tensors)
    if _POSITIONS in tensors:
        tensors[_POSITIONS] = resample_positions(tensors[_POSITIONS], model.grid_size, image_size // patch)
    return replace(weights, model=replace(model, image_size=image_size), tensors=tensors)


def build_module(
    weights: Weights, head: Head | None = None, kernels: Kernels = Kernels()
) -> Trunk | Classifier | Segmenter:
    """The module that the weights belong to, holding them in fp32.

    Args:
        weights: of a trunk, a classifier or a segmenter; a mask token is left out.
        head: with which head; None takes the one that there is.
        kernels: implementations of the fused operations.

    Raises:
        ConfigError: where there is no trunk or no such head, or the tensors do not fit the model.
    """
    tensors = {name: value for name, value in weights.tensors.items() if name != MASK_TOKEN}
    chosen = head or head_of(weights)
    require(
        any(name.startswith("trunk.") for name in tensors),
        f"the {weights.origin} hold no trunk, like a linear probe's checkpoint: give the trunk's own.",
    )
    require(
        chosen == "none" or _HEADS[chosen] in tensors,
        f"the {weights.origin} have no head that gives {chosen}: ask for features.",
    )
    model, build = weights.model, Build(kernels=kernels)
    module: nn.Module
    with torch.device("meta"):
        if chosen == "classes":
            pooling: Pooling = "mean" if "fc_norm.weight" in tensors else "last"
            module = Classifier(model, len(tensors[_HEADS["classes"]]), pooling, build)
        elif chosen == "masks":
            module = Segmenter(model, len(tensors[_HEADS["masks"]]), build)
            tensors |= weights.buffers
        else:
            module = Trunk(model, build)
            tensors = {
                name.removeprefix("trunk."): value for name, value in tensors.items() if name.startswith("trunk.")
            }
    _require_fit(module.state_dict(), tensors, weights.origin)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def _require_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], origin: str) -> None:
    differing = [
        name
        for name in sorted(wanted.keys() | found.keys())
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    ]
    require(
        not differing,
        f"the {origin} do not fit their own config: {len(differing)} tensors are missing, left over or of another "
        f"shape, {differing[:1]} first.",
    )
