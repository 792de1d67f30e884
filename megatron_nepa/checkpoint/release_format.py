"""Names and layout of the authors' released checkpoints (release section 3) against ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_nepa.config import ConfigError, ModelConfig

_PREFIX = "vit_nepa."


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
    for i in range(config.num_layers):
        ours, theirs = f"trunk.blocks.{i}.", f"encoder.layer.{i}."
        for module, parts in modules.items():
            for kind in ("weight", "bias"):
                names[f"{ours}{module}.{kind}"] = [f"{theirs}{part}.{kind}" for part in parts]
        if config.qk_norm == "affine":
            names[f"{ours}attention.q_norm"] = [f"{theirs}attention.attention.q_norm.weight"]
            names[f"{ours}attention.k_norm"] = [f"{theirs}attention.attention.k_norm.weight"]
        if config.layer_scale_init is not None:
            names[f"{ours}layer_scale1"] = [f"{theirs}layer_scale.lambda1"]
            names[f"{ours}layer_scale2"] = [f"{theirs}output.layer_scale.lambda1"]
    return {name: [_PREFIX + part for part in parts] for name, parts in names.items()}


def from_release(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and fuse a released trunk's tensors into a state dict of :class:`~megatron_nepa.models.nepa.NepaForPretraining`.

    Raises:
        ConfigError: listing the keys that are missing or left over.
    """
    names = release_names(config)
    wanted = {part for parts in names.values() for part in parts}
    missing, left_over = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or left_over:
        raise ConfigError(
            f"the released checkpoint does not fit this model: missing {missing or 'nothing'}, left over {left_over or 'nothing'}."
        )
    result = {name: torch.cat([state[part] for part in parts]) for name, parts in names.items()}
    if config.bos_token:
        result["trunk.embedding.bos_token"] = result["trunk.embedding.bos_token"].flatten()
    return result


def to_release(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Inverse of :func:`from_release`."""
    result = {}
    for name, parts in release_names(config).items():
        pieces = state[name].chunk(len(parts))
        result.update({part: piece.contiguous() for part, piece in zip(parts, pieces, strict=True)})
    if config.bos_token:
        token = f"{_PREFIX}embeddings.cls_token"
        result[token] = result[token].view(1, 1, -1)
    return result
