"""Names of the tensors in a folder for Hugging Face transformers against ours."""

from __future__ import annotations

from collections.abc import Collection

from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN
from megatron_nepa.checkpoint.format.renaming import block_names
from megatron_nepa.config import ModelConfig

_HEAD = ("fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias")
DECODER = "decoder."  # of a segmenter, alike in both
# tensors that have leading dimensions of 1 there
TOKENS = ("cls_token", "positions", "mask_token")


def huggingface_names(config: ModelConfig, stored: Collection[str]) -> dict[str, list[str]]:
    """Our name of every tensor to that in ``modeling_nepa.py``; several mean that ours is their concatenation.

    Args:
        config: the model's shape.
        stored: names that a model may have or lack, of either format: a mask token, a head.
    """
    embeddings = "nepa.embeddings."
    names = {
        "trunk.embedding.weight": [f"{embeddings}projection.weight"],
        "trunk.embedding.bias": [f"{embeddings}projection.bias"],
        "trunk.norm.weight": ["nepa.norm.weight"],
        "trunk.norm.bias": ["nepa.norm.bias"],
    }
    if config.bos_token:
        names["trunk.embedding.bos_token"] = [f"{embeddings}cls_token"]
    if config.position_embedding != "none":
        names["trunk.embedding.positions"] = [f"{embeddings}positions"]
    if MASK_TOKEN in stored or f"{embeddings}mask_token" in stored:
        names[MASK_TOKEN] = [f"{embeddings}mask_token"]
    modules = {
        "norm1": ["norm1"],
        "attention.qkv": [f"attention.{part}_proj" for part in "qkv"],
        "attention.out": ["attention.o_proj"],
        "norm2": ["norm2"],
        "feed_forward.up": ["mlp.gate_proj", "mlp.up_proj"] if config.mlp == "swiglu" else ["mlp.up_proj"],
        "feed_forward.down": ["mlp.down_proj"],
    }
    single = {f"attention.{norm}": f"attention.{norm}.weight" for norm in ("q_norm", "k_norm")}
    single |= {scale: scale for scale in ("layer_scale1", "layer_scale2")}
    names |= block_names(config, "nepa.layers.{}.", modules, single)
    heads = [name for name in stored if name in _HEAD or name.startswith(DECODER)]
    return names | {name: [name] for name in heads}
