"""A loaded model computes what the training code evaluates, by every method, for every recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megatron_nepa
from megatron_nepa.checkpoint.reading.modules import at_image_size
from megatron_nepa.checkpoint.reading.weights import Weights, write_weights
from megatron_nepa.config import ConfigError
from megatron_nepa.library.model import NepaModel
from megatron_nepa.objectives.nepa import NepaForPretraining
from tests.export.models import EXAMPLES, difference, expected, random_weights, some_images

TOLERANCE = 1e-5


def loaded(weights: Weights, folder: Path, **how: object) -> NepaModel:
    write_weights(weights, folder)
    model = megatron_nepa.load(folder, **how)  # type: ignore[arg-type]
    assert isinstance(model, NepaModel)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", EXAMPLES)
def test_features_logits_and_blocks(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    weights, images = random_weights(example), some_images(example.model)
    model, wanted = loaded(weights, tmp_path / "model"), expected(weights, images)
    prefix = int(example.model.bos_token)

    found = model.forward_features(images)
    assert difference(found.tokens, wanted.tokens) <= TOLERANCE
    assert difference(found.patches, wanted.tokens[:, prefix:]) <= TOLERANCE
    assert difference(found.last, wanted.tokens[:, -1]) <= TOLERANCE
    assert difference(found.mean, wanted.tokens[:, prefix:].mean(1)) <= TOLERANCE
    assert torch.equal(model(images), found.mean if example.head == "mean" else found.last)

    tokens, blocks = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    assert difference(tokens, wanted.tokens) <= TOLERANCE
    for (patches, bos), stream in zip(blocks, wanted.streams, strict=True):
        assert difference(torch.cat((bos, patches), 1), stream) <= TOLERANCE
    (last,) = model.forward_intermediates(images, [-1], norm=True, intermediates_only=True)
    assert difference(last.flatten(2).mT, wanted.tokens[:, prefix:]) <= TOLERANCE

    if wanted.logits is not None:
        assert difference(model.classify(images), wanted.logits) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["nepa_b", "nepa_b_release", "no RoPE, bidirectional"])
def test_another_image_size(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES[name])
    images = some_images(weights.model, side=84)
    wanted = expected(at_image_size(weights, 84), images).tokens
    once = loaded(weights, tmp_path / "model", image_size=84)
    assert difference(once.forward_features(images).tokens, wanted) <= TOLERANCE
    model = megatron_nepa.load(tmp_path / "model")
    if weights.model.position_embedding == "learned":
        with pytest.warns(UserWarning, match="learned positions of 4 x 4 patches are resampled to 6 x 6"):
            model(images)
    assert difference(model.forward_features(images).tokens, wanted) <= TOLERANCE
    assert model(images[..., :56]).shape == (2, 48)  # 6 x 4 patches


@torch.no_grad()
@pytest.mark.parametrize("name", ["nepa_b", "nepa_b_release"])
def test_predict_next_is_the_training_loss(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES[name])
    images = some_images(weights.model)
    training = NepaForPretraining(weights.model).eval()
    training.load_state_dict(weights.tensors)
    found = loaded(weights, tmp_path / "model").predict_next(images)
    assert found.first == 1 - int(weights.model.bos_token)
    assert found.predicted.shape == (2, 16 - found.first, 48)
    assert difference(-found.cosine.mean(), training(images, torch.arange(2)).loss) <= TOLERANCE


def mutated_causality(weights: Weights) -> Weights:
    return replace(weights, model=replace(weights.model, causal=not weights.model.causal))


def mutated_rope(weights: Weights) -> Weights:
    return replace(weights, model=replace(weights.model, rope=False))


def mutated_qk_norm(weights: Weights) -> Weights:
    return replace(weights, model=replace(weights.model, qk_norm="none"))


def swapped_gate(weights: Weights) -> Weights:
    name = "trunk.blocks.0.feed_forward.up.weight"
    return replace(weights, tensors={**weights.tensors, name: torch.cat(weights.tensors[name].chunk(2)[::-1])})


@torch.no_grad()
@pytest.mark.parametrize("mutate", [mutated_causality, mutated_rope, mutated_qk_norm, swapped_gate])
def test_a_broken_convention_is_seen(mutate: Callable[[Weights], Weights], tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    images = some_images(weights.model)
    model = loaded(mutate(weights), tmp_path / "model")
    assert difference(model.forward_features(images).tokens, expected(weights, images).tokens) > 100 * TOLERANCE


def test_causal_by_argument(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    images = some_images(weights.model)
    model = loaded(weights, tmp_path / "model", causal=False)
    wanted = expected(mutated_causality(weights), images).tokens
    assert difference(model.forward_features(images).tokens.detach(), wanted) <= TOLERANCE
    with pytest.raises(ConfigError, match="predict_next needs a causal model"):
        model.predict_next(images)


def same(found: Tensor, wanted: Tensor) -> bool:
    return difference(found.detach(), wanted.detach()) <= TOLERANCE


@pytest.mark.parametrize("name", ["nepa_b", "nepa_b_release"])
def test_trains_compiles_and_exports(name: str, tmp_path: Path) -> None:
    model = loaded(random_weights(EXAMPLES[name]), tmp_path / "model")
    images = some_images(model.config, count=3)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert same(program.module()(images[:2]), model(images[:2]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(compiled(images), model(images))
    model.train()(images).square().mean().backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    images = some_images(weights.model)
    found = loaded(weights, tmp_path / "model", dtype=dtype)(images)
    assert found.dtype == dtype
    limit = 0.05 if dtype == torch.bfloat16 else TOLERANCE
    assert difference(found.detach().float(), expected(weights, images).tokens[:, -1]) <= limit


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    model = loaded(random_weights(EXAMPLES["nepa_b"]), tmp_path / "model")
    images = some_images(model.config)
    for call, message in (
        (lambda: model.classify(images), "classify needs a head, .*finetune_classification"),
        (lambda: model.segment(images), "segment needs a head, .*finetune_segmentation"),
        (lambda: model.forward_intermediates(images, [3]), r"block \[3\] is not there: the model has 3"),
        (lambda: model.forward_intermediates(images, 4), "the last 4 blocks of 3"),
        (lambda: model.forward_intermediates(images, output_fmt="NHWC"), "take NCHW or NLC"),  # type: ignore[arg-type]
        (lambda: model(images[:, :1]), r"give floats \[B, 3, H, W\]"),
        (lambda: model(images[0]), r"give floats \[B, 3, H, W\]"),
        (lambda: model(images.to(torch.uint8)), r"images are torch.uint8"),
        (lambda: model(images[..., :8, :8]), "an image of 8 x 8 pixels is not a whole number of 14 x 14 patches"),
        (lambda: megatron_nepa.load(tmp_path / "model", image_size=60), "60 is not a multiple of the patch's side 14"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
