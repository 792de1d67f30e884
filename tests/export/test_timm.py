"""timm's models compute what the training code does, in every way that timm calls them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import ConfigError
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.export.timm_folder import write_timm
from megatron_nepa.timm import NepaVisionTransformer
from tests.export.models import CLASSES, EXAMPLES, Example, difference, expected, random_weights, some_images


def create(folder: Path, **settings: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **settings).eval()


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_every_recipe_computes_the_same(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES[name])
    notes = write_timm(weights, RunFacts(classes=CLASSES), tmp_path / "model")
    assert "computes the same" in notes[0]
    model, images = create(tmp_path / "model"), some_images(weights.model)
    wanted = expected(weights, images)
    prefix = int(weights.model.bos_token)
    maps = [stream[:, prefix:].transpose(1, 2).unflatten(2, (4, 4)) for stream in wanted.streams]
    last = wanted.tokens[:, -1] if wanted.logits is None else wanted.logits
    assert difference(model(images), last) < 1e-5
    assert difference(model.forward_features(images), wanted.tokens) < 1e-5
    tokens, between = model.forward_intermediates(images, indices=[0, 2])
    assert difference(tokens, wanted.tokens) < 1e-5
    assert max(difference(*pair) for pair in zip(between, (maps[0], maps[2]), strict=True)) < 1e-5
    features = create(tmp_path / "model", features_only=True, out_indices=(0, 1))
    assert max(difference(*pair) for pair in zip(features(images), maps[:2], strict=True)) < 1e-5
    if wanted.logits is not None:
        assert model.pretrained_cfg["label_names"] == list(CLASSES)


def test_timms_switches(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["imagenet_ft_b_release"])
    write_timm(weights, RunFacts(), tmp_path / "model")
    images = some_images(weights.model)
    without_head = create(tmp_path / "model", num_classes=0)
    assert without_head(images).shape == (2, 48)
    assert create(tmp_path / "model", num_classes=7)(images).shape == (2, 7)
    dynamic = create(tmp_path / "model", dynamic_img_size=True)
    larger = some_images(weights.model, side=84)
    wanted = expected(weights, larger)
    assert difference(dynamic(larger), wanted.logits) < 1e-5
    assert difference(dynamic.forward_features(images), expected(weights, images).tokens) < 1e-5
    dynamic.reset_classifier(3, "last")
    assert torch.equal(dynamic.pool(wanted.tokens), wanted.tokens[:, -1])


def test_weights_by_overlay() -> None:
    names = timm.list_models("nepa_*")
    assert "nepa_base_patch14_224" in names
    assert len(names) == 7
    with torch.device("meta"):
        model = timm.create_model("nepa_base_patch14_224")
        assert isinstance(model, NepaVisionTransformer)
        assert sum(parameter.numel() for parameter in model.parameters()) > 80e6
        assert (model.blocks[0].mlp.fc2.in_features, model.num_classes, model.causal) == (2048, 0, True)


def test_a_file_by_pretrained_cfg_overlay(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    write_timm(weights, RunFacts(), tmp_path / "model")
    shape: dict[str, Any] = {"img_size": 56, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 40 / 48}
    overlay = {"file": str(tmp_path / "model/model.safetensors"), "num_classes": 0}
    model = timm.create_model("nepa_base_patch14_224", pretrained=True, pretrained_cfg_overlay=overlay, **shape).eval()
    images = some_images(weights.model)
    assert difference(model.forward_features(images), expected(weights, images).tokens) < 1e-5


MISTAKES: dict[str, dict[str, Any]] = {
    "causality lost": {"causal": False},
    "RoPE interleaved": {"rope_rotate_half": False},
    "RoPE's base": {"rope_temperature": 10000.0},
    "RoPE's axes swapped": {"rope_grid_indexing": "xy"},
    "epsilon": {"norm_eps": 0.1},
}


@pytest.mark.parametrize("name", MISTAKES)
@torch.no_grad()
def test_a_mistake_in_an_argument_is_seen(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    write_timm(weights, RunFacts(), tmp_path / "model")
    images = some_images(weights.model)
    model = create(tmp_path / "model", **MISTAKES[name])
    assert difference(model.forward_features(images), expected(weights, images).tokens) > 1e-3


def test_gate_and_up_swapped_or_a_norm_missing_is_seen(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    write_timm(weights, RunFacts(), tmp_path / "model")
    file, images = tmp_path / "model/model.safetensors", some_images(weights.model)
    state = load_file(file)
    swapped = {name: torch.cat(value.chunk(2)[::-1]) if ".mlp.fc1." in name else value for name, value in state.items()}
    save_file(swapped, file)
    assert difference(create(file.parent).forward_features(images), expected(weights, images).tokens) > 1e-3


@pytest.mark.parametrize("head", ["", "mean"])
@torch.no_grad()
def test_timms_own_class_holds_bidirectional_models(head: str, tmp_path: Path) -> None:
    base = EXAMPLES["imagenet_ft_b_release"]
    weights = random_weights(base._replace(head=head))
    write_timm(weights, RunFacts(), tmp_path / "model", stock=True)
    model = create(tmp_path / "model")
    assert type(model).__module__ == "timm.models.eva"
    images = some_images(base.model)
    wanted = expected(weights, images)
    assert type(model).__name__ == "Eva"
    assert difference(model.forward_features(images), wanted.tokens) < 1e-4
    if head:
        assert difference(model(images), wanted.logits) < 1e-4


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (EXAMPLES["nepa_b"], "the model is causal, and timm's own Eva computes it bidirectional"),
        (Example(replace(EXAMPLES["nepa_b"].model, causal=False), "last"), "classifies the last token"),
    ],
)
def test_what_timms_own_class_cannot_hold_is_refused(example: Example, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write_timm(random_weights(example), RunFacts(), tmp_path / "model", stock=True)
    assert not list(tmp_path.iterdir())


def test_what_timm_would_compute_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    monkeypatch.setattr("megatron_nepa.export.timm_folder.timm_arguments", lambda model: _bidirectional(weights))
    with pytest.raises(ConfigError, match="what timm computes differs from the training code by"):
        write_timm(weights, RunFacts(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def _bidirectional(weights: Weights) -> dict[str, Any]:
    from megatron_nepa.timm import timm_arguments

    return timm_arguments(weights.model) | {"causal": False}
