"""Names and layout of the authors' released tensors against ours.

Ours are the parameters of :class:`~megatron_nepa.objectives.nepa.NepaForPretraining`; a classifier's head keeps the
release's names (``fc_norm.*``, ``classifier.*``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_nepa.checkpoint.format.renaming import block_names, rename, rename_back
from megatron_nepa.config import ConfigError, ModelConfig

_PREFIX = "vit_nepa."
_HEAD = ("fc_norm", "classifier")
# ours, of the objective: the release has none, and a model without masking needs none
MASK_TOKEN = "trunk.embedding.mask_token"


def release_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter name to the release's; several names mean that ours is their concatenation along dimension 0."""
    names = {
        "trunk.embedding.weight": ["embeddings.patch_embeddings.projection.weight"],
        "trunk.embedding.bias": ["embeddings.patch_embeddings.projection.bias"],
        "trunk.norm.weight": ["layernorm.weight"],
        "trunk.norm.bias": ["layernorm.bias"],
    }
    if config.bos_token:
        names["trunk.embedding.bos_token"] = ["embeddings.cls_token"]
    up = ["intermediate.gate_proj", "intermediate.up_proj"] if config.mlp == "swiglu" else ["intermediate.up_proj"]
    modules = {
        "norm1": ["layernorm_before"],
        "attention.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
        "attention.out": ["attention.output.dense"],
        "norm2": ["layernorm_after"],
        "feed_forward.up": up,
        "feed_forward.down": ["output.dense"],
    }
    single = {f"attention.{norm}": f"attention.attention.{norm}.weight" for norm in ("q_norm", "k_norm")}
    single |= {"layer_scale1": "layer_scale.lambda1", "layer_scale2": "output.layer_scale.lambda1"}
    names |= block_names(config, "encoder.layer.{}.", modules, single)
    return {name: [_PREFIX + part for part in parts] for name, parts in names.items()}


def from_release(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and fuse released tensors into ours.

    Raises:
        ConfigError: listing the keys that are missing or left over.
    """
    misfit = "the released checkpoint does not fit this model"
    result = rename_back(state, release_names(config) | _head_names(state), misfit)
    if config.bos_token:
        result["trunk.embedding.bos_token"] = result["trunk.embedding.bos_token"].flatten()
    return result


def to_release(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Inverse of :func:`from_release`; leaves out the mask token, which the release does not have.

    Raises:
        ConfigError: listing the tensors that are missing or left over.
    """
    misfit = "the checkpoint does not fit the released format"
    ours = {name: value for name, value in state.items() if name != MASK_TOKEN}
    result = rename(ours, release_names(config) | _head_names(state), misfit)
    if config.bos_token:
        token = f"{_PREFIX}embeddings.cls_token"
        result[token] = result[token].view(1, 1, -1)
    return result


def add_missing_qk_norm(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Give an affine QK-norm whose weights were never trained ones: the same function as without parameters.

    Args:
        state: released tensors.
        config: of the model; whether QK-norm is affine is its say, never the tensors'.

    Returns:
        The tensors, and the names that were added.
    """
    names = release_names(config)
    wanted = [part for name, parts in names.items() if name.endswith(("q_norm", "k_norm")) for part in parts]
    added = [part for part in wanted if part not in state]
    return {**state, **{part: torch.ones(config.head_size) for part in added}}, added


def fold_layer_scale(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """Multiply LayerScale into the layer before it (ours by name): the same function without LayerScale.

    Raises:
        ConfigError: where the model has no LayerScale.
    """
    if config.layer_scale_init is None:
        raise ConfigError("this model has no LayerScale: there is nothing to fold.")
    result = dict(state)
    for i in range(config.num_layers):
        for scale, layer in (("layer_scale1", "attention.out"), ("layer_scale2", "feed_forward.down")):
            factor = result.pop(f"trunk.blocks.{i}.{scale}")
            weight, bias = f"trunk.blocks.{i}.{layer}.weight", f"trunk.blocks.{i}.{layer}.bias"
            result[weight] = result[weight] * factor[:, None]
            result[bias] = result[bias] * factor
    return result, replace(config, layer_scale_init=None)


def require_releasable(names: Iterable[str]) -> None:
    """Refuse a checkpoint of a task that the release's format has no place for.

    Raises:
        ConfigError: for a probe, which has no trunk, and for a head other than a classifier's, such as a segmenter's.
    """
    modules = {name.partition(".")[0] for name in names}
    if "trunk" not in modules:
        raise ConfigError("the checkpoint holds no trunk, like a linear probe's: convert the trunk's own checkpoint.")
    heads = sorted(modules - {"trunk", *_HEAD})
    if heads:
        raise ConfigError(
            f"the checkpoint has a head ({', '.join(f'{head}.*' for head in heads)}) that the released format cannot "
            "hold, like a segmenter's: write one safetensors with consolidate instead."
        )


def _head_names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """A classifier's layers, each whole where any of it is there."""
    found = [layer for layer in _HEAD if any(name.startswith(f"{layer}.") for name in state)]
    return {f"{layer}.{kind}": [f"{layer}.{kind}"] for layer in found for kind in ("weight", "bias")}
