"""A folder for transformers computes what the training code does, for every recipe, without this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from megatron_nepa.checkpoint.conversion.compare import read_any
from megatron_nepa.checkpoint.conversion.huggingface_folder import read_huggingface
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import ConfigError, ModelConfig
from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.modeling_nepa import NepaConfig, NepaForImageClassification
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.models.segmenter import Segmenter
from tests.export.models import (
    CLASSES,
    EXAMPLES,
    Example,
    difference,
    expected,
    random_segmenter,
    random_weights,
    some_images,
)

FIXTURE = Path(__file__).parent / "fixtures/nepa_v1"
TRUSTED: dict[str, Any] = {"trust_remote_code": True}


def export(weights: Weights, folder: Path) -> Path:
    write_huggingface(weights, RunFacts(classes=CLASSES), folder)
    return folder


@torch.no_grad()
def load_and_compare(folder: Path, weights: Weights, **settings: Any) -> float:
    """Largest relative difference of a folder's features and logits from the training code's."""
    images = some_images(weights.model)
    wanted = expected(weights, images)
    model = AutoModel.from_pretrained(folder, **TRUSTED, **settings).eval()
    found = model(images, output_hidden_states=True)
    differences = [difference(found.last_hidden_state, wanted.tokens)]
    differences += [difference(*pair) for pair in zip(found.hidden_states[1:], wanted.streams, strict=True)]
    if wanted.logits is not None:
        classifier = AutoModelForImageClassification.from_pretrained(folder, **TRUSTED, **settings).eval()
        differences.append(difference(classifier(images).logits, wanted.logits))
    return max(differences)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_recipe_computes_the_same_and_comes_back_bit_equal(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES[name])
    folder = export(weights, tmp_path / "model")
    assert load_and_compare(folder, weights) < 1e-5
    back = read_any(folder)
    model = weights.model
    if model.position_embedding == "sincos":  # weights as any other in the format
        model = replace(model, position_embedding="learned")
    assert back.model == model
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(value, weights.tensors[key]) for key, value in back.tensors.items())


MUTATIONS = {
    "RoPE turns backwards": ("first * cos - second * sin", "first * cos + second * sin"),
    "RoPE's axes swapped": ("torch.meshgrid(y, x", "torch.meshgrid(x.flip(0), y"),
    "gate and up swapped": ("silu(gate.to(wide)) * up", "silu(up.to(wide)) * gate"),
    "QK-norm missing": ('if kind == "none"', 'if kind != "none"'),
    "causality lost": ("is_causal=self.is_causal", "is_causal=False"),
    "LayerScale missing": ("if scale is None else", "if scale is not None else"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_a_convention_is_seen(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    file = export(weights, tmp_path / "model") / "modeling_nepa.py"
    before, after = MUTATIONS[name]
    assert file.read_text().count(before) == 1
    file.write_text(file.read_text().replace(before, after))
    assert load_and_compare(file.parent, weights) > 1e-3


@pytest.mark.parametrize("settings", [{"attn_implementation": "eager"}, {"dtype": torch.bfloat16}])
def test_other_ways_of_computing(settings: dict[str, Any], tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["imagenet_ft_b"])
    folder = export(weights, tmp_path / "model")
    if "dtype" not in settings:
        assert load_and_compare(folder, weights, **settings) < 1e-5
        model = AutoModel.from_pretrained(folder, **TRUSTED, **settings).eval()
        attention = model(some_images(weights.model), output_attentions=True).attentions[0]
        assert attention.triu(1).abs().max() == 0
        return
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUSTED, **settings).eval()
    images = some_images(weights.model)
    wanted = expected(weights, images).logits
    assert wanted is not None
    assert difference(model(images.bfloat16()).logits.float(), wanted) < 0.05


def test_the_folder_needs_no_package_of_ours(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["imagenet_ft_b_release"])
    export(weights, tmp_path / "model")
    images = some_images(weights.model)
    save_file({"images": images}, tmp_path / "images.safetensors")
    script = """
import sys
sys.modules["megatron_nepa"] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
AutoImageProcessor.from_pretrained("model")
model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True).eval()
assert model.config.id2label[1] == "crane, bird"
save_file({"logits": model(**{"pixel_values": load_file("images.safetensors")["images"]}).logits.detach()}, "logits")
model.save_pretrained("again")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = expected(weights, images).logits
    assert wanted is not None
    assert difference(load_file(tmp_path / "logits")["logits"], wanted) < 1e-5
    # what transformers saves is read back too, and holds its own code
    back = read_huggingface(tmp_path / "again")
    model = weights.model
    if model.position_embedding == "sincos":  # weights as any other in the format
        model = replace(model, position_embedding="learned")
    assert back.model == model
    assert all(torch.equal(value, weights.tensors[key]) for key, value in back.tensors.items())
    assert (tmp_path / "again/modeling_nepa.py").is_file()


def test_without_trust_nothing_is_run(tmp_path: Path) -> None:
    folder = export(random_weights(EXAMPLES["nepa_b"]), tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(folder, trust_remote_code=False)


@torch.no_grad()
def test_the_backbone_in_every_way_that_transformers_offers(tmp_path: Path) -> None:
    """From a segmenter's weights: the stages are the blocks that its heads read."""
    model = replace(EXAMPLES["ade20k_upernet_b_release"].model, num_layers=6)
    weights = random_segmenter(model)
    assert write_huggingface(weights, RunFacts(classes=CLASSES), tmp_path / "model") == []
    config = AutoConfig.from_pretrained(tmp_path / "model", **TRUSTED)
    assert config.out_features == ["stage2", "stage3", "stage4", "stage6"]

    backbone = AutoBackbone.from_config(config, **TRUSTED).eval()
    state = load_file(tmp_path / "model/model.safetensors")
    trunk = {name: value for name, value in state.items() if name.startswith("nepa.")}
    backbone.load_state_dict(trunk)
    images = some_images(model, side=84)
    wanted = expected(weights, images).streams
    maps = [wanted[i][:, 1:].transpose(1, 2).unflatten(2, (6, 6)) for i in (1, 2, 3, 5)]
    for made in (backbone, type(backbone).from_pretrained(tmp_path / "model").eval()):
        found = made(images).feature_maps
        assert max(difference(*pair) for pair in zip(found, maps, strict=True)) < 1e-5
    assert backbone.channels == [model.hidden_size] * 4
    chosen = AutoConfig.from_pretrained(tmp_path / "model", **TRUSTED, out_indices=[1, 5])
    assert chosen.out_features == ["stage1", "stage5"]

    AutoConfig.register("nepa", type(config), exist_ok=True)
    AutoBackbone.register(type(config), type(backbone), exist_ok=True)
    upernet = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, num_labels=3, hidden_size=16, auxiliary_in_channels=model.hidden_size)
    ).eval()
    upernet.backbone.load_state_dict(trunk)
    assert upernet(images).logits.shape == (2, 3, 84, 84)


@pytest.mark.parametrize("name", ["ade20k_upernet_b", "ade20k_upernet_l_release"])
def test_a_segmenter_computes_the_same_and_comes_back_bit_equal(name: str, tmp_path: Path) -> None:
    model = replace(EXAMPLES[name].model, image_size=84)
    weights = random_segmenter(model)
    folder = export(weights, tmp_path / "model")
    found = AutoModelForSemanticSegmentation.from_pretrained(folder, **TRUSTED).eval()
    images, labels = some_images(model), torch.randint(0, 5, (2, 84, 84))
    labels[0, :40] = 255
    module = Segmenter(model, len(CLASSES)).eval()
    module.load_state_dict({**weights.tensors, **weights.buffers})
    with torch.no_grad():
        wanted = module(images, torch.arange(2))
        output = found(images, labels=labels)
        assert difference(output.logits, wanted) < 1e-5
        assert output.loss.item() == pytest.approx(module(images, torch.arange(2), labels).loss.item(), rel=1e-5)
    assert found.config.id2label[1] == "crane, bird"
    back = read_any(folder)
    model = weights.model
    if model.position_embedding == "sincos":  # weights as any other in the format
        model = replace(model, position_embedding="learned")
    assert back.model == model
    for ours, theirs in ((weights.tensors, back.tensors), (weights.buffers, back.buffers)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    processor = AutoImageProcessor.from_pretrained(folder)
    shown = processor(Image.new("RGB", (100, 60)), return_tensors="pt")
    assert shown["pixel_values"].shape == (1, 3, 84, 84)
    (mask,) = processor.post_process_semantic_segmentation(found(**shown), target_sizes=[(60, 100)])
    assert mask.shape == (60, 100)
    assert "AutoModelForSemanticSegmentation.from_pretrained" in (folder / "README.md").read_text()
    # a new head on a trunk trains, from statistics of its own
    trunk = export(random_weights(Example(model, "")), tmp_path / "trunk")
    new = AutoModelForSemanticSegmentation.from_pretrained(trunk, **TRUSTED, num_labels=5).train()
    new(images, labels=labels).loss.backward()
    assert all(value.grad is not None for name, value in new.named_parameters() if not name.startswith("nepa.norm"))
    assert (new.decoder.head.fusion.norm.running_var > 0).all()


@torch.no_grad()
def test_it_compiles_and_exports_as_one_graph(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b_release"])
    model = AutoModel.from_pretrained(export(weights, tmp_path / "model"), **TRUSTED).eval()
    images = some_images(weights.model)
    wanted = expected(weights, images).tokens
    program = torch.export.export(model, (images,)).module()
    for graph in (program, torch.compile(model, fullgraph=True, backend="aot_eager")):
        assert difference(graph(images).last_hidden_state, wanted) < 1e-5


@torch.no_grad()
def test_other_image_sizes(tmp_path: Path) -> None:
    rotated, learned = (random_weights(EXAMPLES[name]) for name in ("nepa_b_release", "nepa_b"))
    images = some_images(rotated.model, side=84)
    model = AutoModel.from_pretrained(export(rotated, tmp_path / "a"), **TRUSTED).eval()
    assert difference(model(images).last_hidden_state, expected(rotated, images).tokens) < 1e-5
    model = AutoModel.from_pretrained(export(learned, tmp_path / "b"), **TRUSTED).eval()
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(images)
    assert model(images, interpolate_pos_encoding=True).last_hidden_state.shape == (2, 36, 48)
    with pytest.raises(ValueError, match="no whole number of 14 x 14 patches"):
        model(images[..., :80, :80])


def test_a_mask_token_goes_along(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"], masked=True)
    folder = export(weights, tmp_path / "model")
    back = read_huggingface(folder).tensors
    assert torch.equal(back["trunk.embedding.mask_token"], weights.tensors["trunk.embedding.mask_token"])
    model, images = AutoModel.from_pretrained(folder, **TRUSTED).eval(), some_images(weights.model)
    all_masked = model(images, bool_masked_pos=torch.ones(2, 16, dtype=torch.bool)).last_hidden_state
    assert torch.allclose(all_masked[0], all_masked[1])


def test_it_trains(tmp_path: Path) -> None:
    """A new head is drawn, gradients flow, and blocks can be computed again in the backward pass."""
    weights = random_weights(EXAMPLES["nepa_b"])
    folder = export(weights, tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUSTED, num_labels=3)
    images, labels = some_images(weights.model), torch.tensor([0, 2])
    losses = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        losses.append({name: value.grad for name, value in model.named_parameters()})
    assert losses[0].keys() == losses[1].keys()
    assert all(difference(losses[1][name], losses[0][name] + 1e-12) < 1e-3 for name in losses[0])


def test_the_defaults_are_those_of_the_training_code() -> None:
    """transformers leaves defaults out of the config.json that it writes."""
    from megatron_nepa.checkpoint.conversion.huggingface_config import model_from_huggingface, model_to_huggingface

    written = model_to_huggingface(ModelConfig(), "NepaModel")
    ours = NepaConfig().to_dict()
    skipped = ("architectures", "auto_map", "dtype", "training")
    assert {name: ours[name] for name in written if name not in skipped} == {
        name: value for name, value in written.items() if name not in skipped
    }
    assert model_from_huggingface({"model_type": "nepa"}) == ModelConfig()


def test_a_folder_of_an_earlier_version_still_loads() -> None:
    wanted = torch.tensor(json.loads((FIXTURE / "expected.json").read_text()))
    weights = read_huggingface(FIXTURE)
    images = some_images(weights.model)
    theirs = AutoModelForImageClassification.from_pretrained(FIXTURE, **TRUSTED).eval()
    ours = NepaForImageClassification.from_pretrained(FIXTURE).eval()
    for logits in (theirs(images).logits, ours(images).logits, expected(weights, images).logits):
        assert difference(logits, wanted) < 1e-5
    assert AutoImageProcessor.from_pretrained(FIXTURE).crop_size["height"] == weights.model.image_size


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_that_were_saved_under_a_wrapper_are_taken(wrapper: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    file = export(weights, tmp_path / "model") / "model.safetensors"
    save_file({f"{wrapper}{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    found = read_huggingface(tmp_path / "model").tensors
    assert found.keys() == weights.tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2; this release reads up to version 1"),
        ({"model_type": "dinov2"}, "is of another model"),
        ({"num_hidden_layers": 2}, "do not fit their config: missing nothing, left over"),
        ({"qk_norm": "rms"}, "'rms' for qk_norm, which is one of"),
        ({"intermediate_size": 8}, r"feed_forward.up.weight is .* in the file, .* by config.json"),
        ({"num_channels": 4}, "num_channels 4; this model serves 3"),
    ],
)
def test_bad_folders_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = export(random_weights(EXAMPLES["nepa_b"]), tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_huggingface(folder)
    with pytest.raises(ConfigError, match="exists: choose another name"):
        export(random_weights(EXAMPLES["nepa_b"]), folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="holds no model for transformers"):
        read_huggingface(folder)
    probe = Weights(ModelConfig(), {"classifier.weight": torch.ones(2, 2)}, "a probe")
    with pytest.raises(ConfigError, match="holds no trunk"):
        write_huggingface(probe, RunFacts(), folder)
