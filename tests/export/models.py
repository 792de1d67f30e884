"""Tiny models of every recipe and switch, all of whose parameters are random, and what the training code computes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import ModelConfig
from megatron_nepa.models.classifier import Classifier
from megatron_nepa.models.segmenter import Segmenter
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, SEGMENTATION_RECIPES

CLASSES = ("cat", "crane, bird", "dog", "owl", "yak")


class Example(NamedTuple):
    """A model of a recipe.

    Attributes:
        model: its config, tiny.
        head: "last" or "mean" for a classifier, "" for a trunk.
    """

    model: ModelConfig
    head: str


def _tiny(model: ModelConfig) -> ModelConfig:
    return replace(
        model, image_size=56, patch_size=14, hidden_size=48, num_layers=3, num_heads=3, mlp_hidden_size=40,
        layer_scale_init=None if model.layer_scale_init is None else 0.5,
    )  # fmt: skip


_BASE = ModelConfig()
EXAMPLES = {
    **{name: Example(_tiny(recipe().model), "") for name, recipe in PRETRAINING_RECIPES.items()},
    **{name: Example(_tiny(recipe().model), recipe().head.pooling) for name, recipe in CLASSIFICATION_RECIPES.items()},
    **{name: Example(_tiny(recipe().model), "") for name, recipe in SEGMENTATION_RECIPES.items()},
    "no QK-norm, no LayerScale": Example(_tiny(replace(_BASE, qk_norm="none", layer_scale_init=None)), ""),
    "positions beside a BOS token": Example(_tiny(replace(_BASE, bos_token=True, qk_norm="affine")), ""),
    "no RoPE, bidirectional": Example(_tiny(replace(_BASE, rope=False, causal=False, mlp="gelu")), ""),
    "mean of causal patches": Example(_tiny(replace(_BASE, bos_token=True)), "mean"),
}


def random_weights(example: Example, masked: bool = False) -> Weights:
    """Every parameter random: norms and LayerScale around a half, so that no mistake hides behind a 1 or a 0."""
    module: torch.nn.Module
    if example.head:
        module = Classifier(example.model, len(CLASSES), example.head)
    elif masked:
        module = Trunk(example.model, mask_ratio=0.5)
    else:
        module = Trunk(example.model)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, parameter in module.named_parameters():
        name = name if example.head else f"trunk.{name}"
        value = torch.randn(parameter.shape, generator=generator)
        if any(part in name for part in ("norm", "layer_scale")) and not name.endswith("bias"):
            value = 0.3 + 0.4 * torch.rand(parameter.shape, generator=generator)
        elif value.ndim > 1 and "positions" not in name:
            value /= value[0].numel() ** 0.5
        tensors[name] = value
    return Weights(example.model, tensors, "random weights of a test")


def random_segmenter(model: ModelConfig) -> Weights:
    """A segmenter of the classes, its heads and the running statistics of their BatchNorms random too."""
    trunk = random_weights(Example(model, ""))
    module = Segmenter(model, len(CLASSES))
    generator = torch.Generator().manual_seed(8)
    tensors = {
        name: trunk.tensors[name]
        if name in trunk.tensors
        else torch.randn(value.shape, generator=generator) / max(value[0].numel(), 4) ** 0.5
        for name, value in module.named_parameters()
    }
    buffers = {name: 0.5 + torch.rand(value.shape, generator=generator) for name, value in module.named_buffers()}
    return Weights(model, tensors, trunk.origin, {name: buffers[name] for name in buffers.keys() & module.state_dict()})


def some_images(model: ModelConfig, count: int = 2, side: int | None = None) -> Tensor:
    """Images in [-1, 1]."""
    size = side or model.image_size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Expected(NamedTuple):
    """What the training code evaluates.

    Attributes:
        tokens: the final norm's output, [B, T, D].
        streams: after every block, [B, T, D].
        logits: of a classifier, or None.
    """

    tokens: Tensor
    streams: tuple[Tensor, ...]
    logits: Tensor | None


@torch.no_grad()
def expected(weights: Weights, images: Tensor) -> Expected:
    """The training code's evaluation."""
    example_head = "mean" if "fc_norm.weight" in weights.tensors else "last"
    count = torch.arange(len(images))
    trunk = Trunk(weights.model).eval()
    prefix = "trunk."
    trunk.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in weights.tensors.items()
            if name.startswith(prefix) and not name.endswith("mask_token")
        }
    )
    out = trunk(images, count, range(weights.model.num_layers))
    shape = (len(images), out.period, -1)
    logits = None
    if "classifier.weight" in weights.tensors:
        classifier = Classifier(weights.model, len(weights.tensors["classifier.bias"]), example_head).eval()
        classifier.load_state_dict(weights.tensors)
        logits = classifier(images, count)
    return Expected(out.output.view(shape), tuple(tap.view(shape) for tap in out.taps), logits)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
