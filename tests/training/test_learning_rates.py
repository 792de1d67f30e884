"""Layer-wise learning rates: both published conventions, the ramps, the release's warm-up and head."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_nepa.config import ClassificationConfig, LayerDecayConfig, ModelConfig, OptimizerConfig
from megatron_nepa.models.classifier import Classifier
from megatron_nepa.training.engine.learning_rates import LearningRates

MODEL = ModelConfig(
    image_size=16, patch_size=8, hidden_size=16, num_layers=3, num_heads=2, mlp_hidden_size=8, bos_token=True
)
# a peak of 1 at a batch of 256
RUN = ClassificationConfig(
    model=MODEL,
    optimizer=OptimizerConfig(base_lr=1.0, warmup_ratio=0.0, decay_bos_token=True),
    steps=100,
    global_batch_size=256,
)


def rates_by_parameter(decay: LayerDecayConfig, step: int, warmup: float = 0.0) -> dict[str, float]:
    """The learning rate of every parameter after ``step`` steps, over what no decay would give."""
    run = replace(RUN, layer_decay=decay, optimizer=replace(RUN.optimizer, warmup_ratio=warmup))
    model = Classifier(MODEL, 5, "mean")
    names = {id(param): name for name, param in model.named_parameters()}
    rates = LearningRates(run, total_steps=100, layer_decay=run.layer_decay)
    groups = rates.groups(model)
    assert sum(len(group["params"]) for group in groups) == len(names)
    at = rates.at(step)
    return {names[id(param)]: at[group["name"]] for group in groups for param in group["params"]}


TABLES = {
    # BEiT, MAE: the head 1, then a power a layer, the patch embedding last
    "beit": {
        "trunk.embedding.weight": 1 / 16,
        "trunk.embedding.bos_token": 1 / 16,
        "trunk.embedding.positions": 1 / 16,
        "trunk.blocks.0.attention.qkv.weight": 1 / 8,
        "trunk.blocks.0.norm1.bias": 1 / 8,
        "trunk.blocks.1.layer_scale1": 1 / 4,
        "trunk.blocks.2.feed_forward.down.weight": 1 / 2,
        "trunk.norm.weight": 1.0,
        "fc_norm.weight": 1.0,
        "classifier.weight": 1.0,
    },
    # the release: the last block 1, one power less everywhere; head and final norm have a rate of their own
    "release": {
        "trunk.embedding.weight": 1 / 8,
        "trunk.blocks.0.attention.qkv.weight": 1 / 4,
        "trunk.blocks.1.layer_scale1": 1 / 2,
        "trunk.blocks.2.feed_forward.down.weight": 1.0,
        "fc_norm.weight": 1.0,
        "trunk.norm.weight": 0.01,
        "classifier.bias": 0.01,
    },
}


@pytest.mark.parametrize("convention", TABLES)
def test_scales_equal_the_published_conventions(convention: str) -> None:
    head_lr = 0.01 if convention == "release" else None
    found = rates_by_parameter(LayerDecayConfig(rate=0.5, convention=convention, head_lr=head_lr), step=0)  # type: ignore[arg-type]
    for name, expected in TABLES[convention].items():
        assert found[name] == pytest.approx(expected), name


@pytest.mark.parametrize(("ramp", "halfway"), [("linear", 0.75), ("cosine", 0.75)])
def test_the_rate_moves_to_its_end(ramp: str, halfway: float) -> None:
    decay = LayerDecayConfig(rate=0.5, rate_end=1.0, ramp=ramp)  # type: ignore[arg-type]
    rates = LearningRates(replace(RUN, layer_decay=decay), 100, decay)
    assert rates.scale(2, 0) == 0.25
    assert rates.scale(2, 50) == pytest.approx(halfway**2)
    assert rates.scale(2, 100) == pytest.approx(1.0)
    quarter = 0.25 if ramp == "linear" else 0.5 * (1 - math.cos(math.pi / 4))
    assert rates.scale(1, 25) == pytest.approx(0.5 + 0.5 * quarter)


def test_the_releases_warm_up_is_longer_for_deep_layers() -> None:
    """W = 20 steps: a layer of factor f warms up for max(1, W - round(W f)) of them, then a cosine of its own."""
    decay = LayerDecayConfig(rate=0.5, convention="release", layerwise_warmup=True)
    first = rates_by_parameter(decay, step=0, warmup=0.2)
    assert first["trunk.blocks.2.norm1.weight"] == pytest.approx(1.0)  # factor 1: one step
    assert first["trunk.blocks.1.norm1.weight"] == pytest.approx(0.5 / 10)
    assert first["trunk.blocks.0.norm1.weight"] == pytest.approx(0.25 / 15)
    assert first["trunk.embedding.weight"] == pytest.approx(0.125 / 18)
    last = rates_by_parameter(decay, step=99, warmup=0.2)
    assert 0 < last["trunk.embedding.weight"] < 1e-3


def test_what_is_not_a_matrix_is_not_decayed() -> None:
    model = Classifier(MODEL, 5, "mean")
    for group in LearningRates(RUN, 100, RUN.layer_decay).groups(model):
        is_bos = [param is model.trunk.embedding.bos_token for param in group["params"]]
        for param, bos in zip(group["params"], is_bos, strict=True):
            assert (group["weight_decay"] > 0) == (param.ndim > 1 or bos)


def test_the_optimizer_takes_each_groups_rate() -> None:
    """The names of the groups survive in the optimizer's own."""
    model = Classifier(MODEL, 5, "mean")
    rates = LearningRates(RUN, 100, LayerDecayConfig(rate=0.5))
    optimizer = torch.optim.AdamW(rates.groups(model))
    assert {group["name"] for group in optimizer.param_groups} == set(rates.at(3))
