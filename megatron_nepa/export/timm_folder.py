"""Writing a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from torch import Tensor

from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN
from megatron_nepa.checkpoint.format.renaming import rename
from megatron_nepa.checkpoint.format.safetensors_file import write_safetensors
from megatron_nepa.checkpoint.reading.tensor_files import MODEL_FILE
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import beside
from megatron_nepa.config import ModelConfig, require
from megatron_nepa.export.evaluated import evaluate_weights, require_equal, sample_images
from megatron_nepa.export.huggingface import exportable
from megatron_nepa.export.preprocessor import resize_of
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.timm import eva_arguments, timm_arguments

_OURS, _STOCK = "nepa_base_patch14_224", "eva02_base_patch14_224"  # any size: the arguments replace all of theirs
_TOLERANCE = 1e-4  # of the largest value


def write_timm(weights: Weights, facts: RunFacts, folder: Path, stock: bool = False) -> list[str]:
    """Write config.json and model.safetensors, load them with timm and compare; all of it or nothing.

    Args:
        weights: of a trunk, a classifier, or a segmenter, of which the trunk alone is written.
        facts: of their run.
        folder: that must not exist.
        stock: write them for timm's own Eva, which needs no import of this package.

    Returns:
        What a user should know of the conversion.

    Raises:
        ConfigError: where ``folder`` exists, there is no trunk, the stock class cannot hold the model, or timm computes
            something else.
    """
    require(not folder.exists(), f"{folder} exists: choose another name for the result.")
    weights, left_out = exportable(weights)
    model = weights.model
    classes = len(weights.tensors["classifier.weight"]) if "classifier.weight" in weights.tensors else 0
    has_mean = "fc_norm.weight" in weights.tensors
    if stock:
        require(
            not model.causal,
            "the model is causal, and timm's own Eva computes it bidirectional in model(x) and features_only: write it "
            "without --stock.",
        )
        require(
            not classes or has_mean,
            "the head classifies the last token, which timm's own Eva cannot pool: write it without --stock.",
        )
    arguments = eva_arguments(model) if stock else timm_arguments(model)
    pooling = "avg" if stock or has_mean else "last"
    arguments |= {"global_pool": pooling, "use_fc_norm": has_mean, "use_post_transformer_norm": True}
    config = {
        "architecture": _STOCK if stock else _OURS,
        "num_classes": classes,
        "num_features": model.hidden_size,
        "global_pool": pooling,
        "model_args": arguments,
        "pretrained_cfg": _pretrained_cfg(model, facts, classes),
    }
    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(_tensors(weights), partial / MODEL_FILE, {"format": "pt"})
        apart = _compare(weights, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    notes += ["left out, timm has no such tensor: the mask token"] if MASK_TOKEN in weights.tensors else []
    need = "" if stock else ' after "import megatron_nepa.timm"'
    return [
        *notes,
        f"timm {timm.__version__} computes the same to {apart:.1g} of the largest value",
        f'load it with timm.create_model("local-dir:{folder}", pretrained=True){need}',
    ]


@torch.no_grad()
def _compare(weights: Weights, folder: Path) -> float:
    images = sample_images(weights.model, 2)
    wanted = evaluate_weights(weights, images)
    model: Eva = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # type: ignore[assignment]
    apart = require_equal(model.forward_features(images), wanted.tokens, _TOLERANCE, "what timm computes")
    if wanted.logits is not None:
        apart = max(apart, require_equal(model(images), wanted.logits, _TOLERANCE, "what timm classifies"))
    return apart


def _pretrained_cfg(model: ModelConfig, facts: RunFacts, classes: int) -> dict[str, Any]:
    side, squash = resize_of(model, facts.run)
    return {
        "num_classes": classes,
        "input_size": [3, model.image_size, model.image_size],
        "fixed_input_size": True,
        "crop_pct": model.image_size / side,
        "crop_mode": "squash" if squash else "center",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **({"label_names": list(facts.classes)} if len(facts.classes) == classes and classes else {}),
    }


def _tensors(weights: Weights) -> dict[str, Tensor]:
    model = weights.model
    names = _names(model) | {
        f"{ours}.{kind}": [f"{theirs}.{kind}"]
        for ours, theirs in (("fc_norm", "fc_norm"), ("classifier", "head"))
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in weights.tensors
    }
    state = rename({name: value for name, value in weights.tensors.items() if name != MASK_TOKEN}, names)
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].reshape(1, -1, model.hidden_size)
    if model.qk_norm != "none":  # timm's norm has weight and bias
        for i in range(model.num_layers):
            for norm in ("q_norm", "k_norm"):
                state.setdefault(f"blocks.{i}.attn.{norm}.weight", torch.ones(model.head_size))
                state[f"blocks.{i}.attn.{norm}.bias"] = torch.zeros(model.head_size)
    return {name: value.clone() for name, value in state.items()}


def _names(model: ModelConfig) -> dict[str, list[str]]:
    """Our name of every tensor of a trunk to timm's."""
    names = {
        "trunk.embedding.weight": "patch_embed.proj.weight",
        "trunk.embedding.bias": "patch_embed.proj.bias",
        "trunk.norm.weight": "norm.weight",
        "trunk.norm.bias": "norm.bias",
    }
    if model.bos_token:
        names["trunk.embedding.bos_token"] = "cls_token"
    if model.position_embedding != "none":
        names["trunk.embedding.positions"] = "pos_embed"
    modules = {
        "norm1": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "norm2": "norm2",
        "feed_forward.up": "mlp.fc1",  # gate first, as ours
        "feed_forward.down": "mlp.fc2",
    }
    for i in range(model.num_layers):
        ours, theirs = f"trunk.blocks.{i}.", f"blocks.{i}."
        for module, part in modules.items():
            names |= {f"{ours}{module}.{kind}": f"{theirs}{part}.{kind}" for kind in ("weight", "bias")}
        if model.qk_norm == "affine":
            names |= {f"{ours}attention.{norm}": f"{theirs}attn.{norm}.weight" for norm in ("q_norm", "k_norm")}
        if model.layer_scale_init is not None:
            names |= {f"{ours}layer_scale{n}": f"{theirs}gamma_{n}" for n in (1, 2)}
    return {name: [part] for name, part in names.items()}
