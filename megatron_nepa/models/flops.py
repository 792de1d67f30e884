"""Floating-point operations of the model: throughput in TFLOP/s, the numerator of MFU.

Model FLOPs follow PaLM (Chowdhery et al., 2022, appendix B): matrix products only, 2 per multiply-add, and a training
step costs three forward passes. Full activation checkpointing repeats the blocks' forward pass, which takes time but
adds no model FLOPs: it lowers the MFU, as it should. Selective activation checkpointing repeats no matrix product.
"""

from __future__ import annotations

from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of the forward pass of one image; causal attention counts the query-key pairs that it keeps."""
    pixels = IMAGE_CHANNELS * config.patch_size**2
    patch_embedding = 2 * config.num_patches * pixels * config.hidden_size
    return patch_embedding + blocks_flops(config, config.sequence_length)


def blocks_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the blocks' forward pass on one sample of ``tokens`` tokens."""
    width = config.hidden_size
    pairs = tokens * (tokens + 1) // 2 if config.causal else tokens**2
    linears = tokens * (4 * width**2 + feed_forward_products(config))  # qkv, out, feed-forward
    attention = 2 * pairs * width  # scores, and the mix of values
    return 2 * config.num_layers * (linears + attention)


def feed_forward_products(config: ModelConfig) -> int:
    """Multiply-adds of a feed-forward layer on one token."""
    return (3 if config.mlp == "swiglu" else 2) * config.hidden_size * config.mlp_hidden_size


def train_flops(config: ModelConfig) -> int:
    """Model FLOPs of one image's share of a training step: forward and backward, three times the forward pass."""
    return 3 * forward_flops(config)
