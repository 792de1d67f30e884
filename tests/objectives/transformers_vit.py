"""A ViT as transformers builds it, and its tensors under the names of our trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nepa.config import ModelConfig

VIT = ModelConfig(
    image_size=56,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    mlp="gelu",
    mlp_hidden_size=64,
    qk_norm="none",
    rope=False,
    position_embedding="sincos",
    layer_scale_init=None,
    causal=False,
)
# what transformers 5.0 calls its parameters, and later releases
RENAMED = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def settings_of(model: ModelConfig) -> dict[str, int | float | str]:
    """What transformers' configs call the settings of ``model``."""
    return {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_hidden_size,
        "layer_norm_eps": model.layer_norm_eps,
        "attn_implementation": "sdpa",  # the other one rounds the softmax to fp32
    }


@torch.no_grad()
def spread_parameters(model: nn.Module) -> None:
    """Move all but positions, biases and norms away from 0 and 1, at which a wrong one would not show."""
    for name, param in model.named_parameters():
        if "pos" not in name:
            param.add_(torch.randn_like(param) * 0.05)


def newly_named(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, or gradients, under the names of later releases."""
    for old, new in RENAMED:
        theirs = {name.replace(old, new): value for name, value in theirs.items()}
    return theirs


def linear_of(theirs: dict[str, Tensor], prefix: str, name: str) -> dict[str, Tensor]:
    """Weight and bias of a layer or norm of theirs, under our name of it."""
    return {f"{name}.{kind}": theirs[f"{prefix}.{kind}"] for kind in ("weight", "bias")}


def block_of(theirs: dict[str, Tensor], prefix: str, name: str) -> dict[str, Tensor]:
    """The tensors of a block of theirs, under our names."""
    qkv = [f"{prefix}.attention.{part}_proj" for part in "qkv"]
    return {
        **linear_of(theirs, f"{prefix}.layernorm_before", f"{name}.norm1"),
        **{f"{name}.attention.qkv.{k}": torch.cat([theirs[f"{x}.{k}"] for x in qkv]) for k in ("weight", "bias")},
        **linear_of(theirs, f"{prefix}.attention.o_proj", f"{name}.attention.out"),
        **linear_of(theirs, f"{prefix}.layernorm_after", f"{name}.norm2"),
        **linear_of(theirs, f"{prefix}.mlp.fc1", f"{name}.feed_forward.up"),
        **linear_of(theirs, f"{prefix}.mlp.fc2", f"{name}.feed_forward.down"),
    }


def trunk_of(theirs: dict[str, Tensor], num_layers: int, theirs_at: str = "", ours_at: str = "") -> dict[str, Tensor]:
    """Patch embedding, blocks and last norm of an encoder of theirs, under the names of our trunk.

    Args:
        theirs: of :func:`newly_named`.
        num_layers: blocks of the encoder.
        theirs_at: what stands before the encoder's names, with its dot.
        ours_at: what is to stand before the trunk's, likewise.
    """
    found = linear_of(theirs, f"{theirs_at}embeddings.patch_embeddings.projection", f"{ours_at}embedding")
    for i in range(num_layers):
        found |= block_of(theirs, f"{theirs_at}layers.{i}", f"{ours_at}blocks.{i}")
    return found | linear_of(theirs, f"{theirs_at}layernorm", f"{ours_at}norm")
