"""JEPA against transformers' I-JEPA encoder and plain words: features, loss and every gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import IJepaConfig, IJepaModel

from megatron_nepa.config import (
    ConfigError,
    JepaObjective,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainingConfig,
)
from megatron_nepa.models.build import Build
from megatron_nepa.models.positions import sine_positions
from megatron_nepa.objectives.block_masks import block_masks
from megatron_nepa.objectives.jepa import JepaForPretraining
from megatron_nepa.training.reporting.health import EmbeddingHealth, embedding_health, read_health
from tests.distributed.cases import sample_images
from tests.models.test_objective import photograph_crops
from tests.objectives.transformers_vit import VIT, newly_named, settings_of, spread_parameters, trunk_of

MODEL = replace(VIT, image_size=84)
OBJECTIVE = JepaObjective(predictor_hidden_size=16, predictor_num_layers=2, predictor_num_heads=2)
SEED, STEP, BATCH = 11, 3, 3
SAMPLES = torch.arange(BATCH) + 40


class GivenAverage:
    """An average that a test hands out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def start(self) -> None:
        pass

    def wait(self) -> None:
        pass


def oracle(seed: int) -> Any:
    torch.manual_seed(seed)
    model = IJepaModel(IJepaConfig(**settings_of(MODEL)), add_pooling_layer=False).double().eval()
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(sine_positions(MODEL.grid_size, MODEL.hidden_size, 0))
    spread_parameters(model)
    return model


def ours_of(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their encoder's tensors, or gradients, under the names of our trunk."""
    return trunk_of(newly_named(theirs), MODEL.num_layers)


def encode(theirs: Any, images: Tensor, kept: Tensor | None) -> Tensor:
    """Features of all patches, or of those in ``kept`` alone, by transformers."""

    def select(module: Any, inputs: Any, tokens: Tensor) -> Tensor:
        return tokens if kept is None else torch.stack([row[index] for row, index in zip(tokens, kept, strict=True)])

    hook = theirs.embeddings.register_forward_hook(select)
    features: Tensor = theirs(images).last_hidden_state
    hook.remove()
    return features


def build() -> tuple[JepaForPretraining, Any, Any]:
    """Our model, and their encoders with its trunk's weights and with its targets'."""
    ours = JepaForPretraining(MODEL, OBJECTIVE, Build(seed=SEED)).double()
    context, target = oracle(0), oracle(1)
    ours.trunk.load_state_dict(ours_of(context.state_dict()), strict=False)
    with torch.no_grad():
        for name, param in ours.predictor.named_parameters():
            if name != "positions":
                param.add_(torch.randn_like(param) * 0.05)
    ours.targets.attach(GivenAverage(ours_of(target.state_dict())))
    return ours, context, target


def images() -> Tensor:
    return sample_images(range(BATCH), MODEL, torch.float64)


def test_the_encoders_are_those_of_transformers() -> None:
    ours, context, target = build()
    kept = block_masks(OBJECTIVE, (6, 6), SEED, STEP, SAMPLES).context
    found = ours.trunk(images(), SAMPLES, kept=kept).output
    assert (found - encode(context, images(), kept).flatten(0, 1)).abs().max() < 1e-9
    ours.train()
    found = ours.targets(images(), SAMPLES).output
    assert (found - encode(target, images(), None).flatten(0, 1)).abs().max() < 1e-9


def plain_predictor(params: dict[str, Tensor], context: Tensor, kept: Tensor, block: Tensor) -> Tensor:
    """Features of one block of one sample: context [C, D], patches [C] and [A]; result [A, D]."""
    positions = sine_positions(MODEL.grid_size, OBJECTIVE.predictor_hidden_size, 0).double()
    tokens = context @ params["in_weight"].T + params["in_bias"] + positions[kept]
    x = torch.cat((tokens, params["mask_token"] + positions[block]))
    width, heads = OBJECTIVE.predictor_hidden_size, OBJECTIVE.predictor_num_heads

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, (width,), weight, bias, MODEL.layer_norm_eps)

    for i in range(OBJECTIVE.predictor_num_layers):
        name = f"blocks.{i}"

        def linear(x: Tensor, part: str, name: str = name) -> Tensor:
            return x @ params[f"{name}.{part}.weight"].T + params[f"{name}.{part}.bias"]

        q, k, v = (
            t.view(-1, heads, width // heads).transpose(0, 1)
            for t in linear(norm(x, f"{name}.norm1"), "attention.qkv").chunk(3, dim=1)
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).softmax(dim=2)
        x = x + linear((weights @ v).transpose(0, 1).flatten(1), "attention.out")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{name}.norm2"), "feed_forward.up"))
        x = x + linear(hidden, "feed_forward.down")
    return norm(x, "norm")[len(kept) :] @ params["out_weight"].T + params["out_bias"]


def test_loss_and_every_gradient_are_those_of_plain_words() -> None:
    ours, context, target = build()
    masks = block_masks(OBJECTIVE, (6, 6), SEED, STEP, SAMPLES)
    params = {name: p.detach().clone().requires_grad_() for name, p in ours.predictor.named_parameters()}
    encoded = encode(context, images(), masks.context)
    with torch.no_grad():
        wanted = encode(target, images(), None)
        wanted = (wanted - wanted.mean(2, keepdim=True)) / (wanted.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    losses = []
    for i in range(BATCH):
        for block in masks.targets[i]:
            error = (plain_predictor(params, encoded[i], masks.context[i], block) - wanted[i, block]).abs()
            losses.append(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    output = ours(images(), SAMPLES, STEP)
    output.loss.backward()
    assert abs(output.loss.item() - loss.item()) < 1e-9
    expected = {f"predictor.{name}": p.grad for name, p in params.items() if name != "positions"}
    theirs = {name: p.grad for name, p in context.named_parameters() if p.grad is not None}
    expected |= {f"trunk.{name}": grad for name, grad in ours_of(theirs).items()}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad is not None
        assert (grad - expected[name]).abs().max() < 1e-9, name


def run(**changes: Any) -> PretrainingConfig:
    settings: dict[str, Any] = {
        "model": MODEL,
        "objective": OBJECTIVE,
        "optimizer": OptimizerConfig(ema_decay=OBJECTIVE.momentum),
        "steps": 1,
    }
    return PretrainingConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": OptimizerConfig(ema_decay=0.9999)}, "set optimizer.ema_decay to 0.996, not 0.9999"),
        ({"optimizer": OptimizerConfig(ema_decay=0.996, ema_warmup=True)}, "leave optimizer.ema_warmup off"),
        ({"optimizer": OptimizerConfig(ema_decay=0.0)}, "set optimizer.ema_decay to 0.996, not 0"),
        ({"model": replace(MODEL, mlp_hidden_size=1)}, "mlp_hidden_size 1 leaves the predictor"),
        ({"model": ModelConfig(image_size=84)}, "set model.causal to false"),
        ({"model": ModelConfig(image_size=84, causal=False, bos_token=True)}, "set model.bos_token to false"),
        ({"objective": JepaObjective(context_ratio=0.8)}, "asks for 29 of 6 x 6 patches"),
        ({"parallel": ParallelConfig(4)}, "take a size that divides both"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], said: str) -> None:
    run()
    with pytest.raises(ConfigError, match=said):
        run(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"momentum": 0.0}, "objective.momentum is 0.0; it must lie in"),
        ({"momentum": 1.0}, "objective.momentum is 1.0; it must lie in"),
        ({"target_aspect_max": 1e308}, "must stand in that order in"),
        ({"target_aspect_min": 5e-324}, "must stand in that order in"),
        ({"predictor_num_heads": 5}, "must be a multiple of 4"),
        ({"num_targets": 0}, "must be at least 1"),
        ({"context_ratio": 0.0}, "it must lie in"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        JepaObjective(**changes)


def test_the_decay_rises_linearly_to_one() -> None:
    decay = run().average_decay(100)
    assert decay.at(1) == 0.996
    assert decay.at(51) == pytest.approx(0.998)
    assert decay.at(101) == 1.0
    assert decay.initial_share(2) == pytest.approx(0.996 * 0.99604)


class MovingAverage(GivenAverage):
    """An average of a module's weights, moved by hand; decay 0 follows the weights themselves."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.trained = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self.decay = decay
        super().__init__({name: param.detach().clone() for name, param in self.trained.items()})

    @torch.no_grad()
    def move(self) -> None:
        for name, param in self.trained.items():
            self.tensors[name].lerp_(param, 1 - self.decay)


def train(decay: float, steps: int) -> dict[str, EmbeddingHealth]:
    """Spread of targets and predictions after training on crops of a photograph."""
    model = replace(MODEL, image_size=56, patch_size=7, hidden_size=64, mlp_hidden_size=128)
    jepa = JepaForPretraining(
        model, JepaObjective(predictor_hidden_size=32, predictor_num_layers=2, predictor_num_heads=4)
    )
    average = MovingAverage(jepa.trunk, decay)
    jepa.targets.attach(average)
    trained = [param for param in jepa.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        output = jepa(photograph_crops(16, step), torch.arange(16) + 16 * step, step)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.move()
    return {name: read_health(embedding_health(rows)) for name, rows in output.embeddings.items()}


def test_without_its_average_it_collapses_and_the_health_shows_it() -> None:
    collapsed, kept = train(0.0, steps=75), train(0.99, steps=75)
    # all predictions are one vector, which the loss of 0.005 does not tell from a good prediction
    assert collapsed["prediction"].std < 0.02
    assert collapsed["prediction"].effective_rank < 1.5
    assert kept["prediction"].std > 3 * collapsed["prediction"].std
    assert kept["target"].effective_rank > 2 * collapsed["target"].effective_rank


@pytest.mark.slow
def test_with_its_average_the_targets_spread_again() -> None:
    # after some 150 steps so small a problem leaves the collapse with the raw weights, too, which no one can count on
    collapsed, kept = train(0.0, steps=120), train(0.99, steps=300)
    assert collapsed["target"].mean_direction > 0.95
    assert kept["target"].mean_direction < 0.8
    assert kept["target"].std > 4 * collapsed["target"].std
