"""Floating-point operations of the model: throughput in TFLOP/s, the numerator of MFU.

Model FLOPs follow PaLM (Chowdhery et al., 2022, appendix B): matrix products only, 2 per multiply-add, and a training
step costs three forward passes. Full activation checkpointing repeats the blocks' forward pass, which takes time but
adds no model FLOPs: it lowers the MFU, as it should. Selective activation checkpointing repeats no matrix product.
"""

from __future__ import annotations

from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of the forward pass of one image; causal attention counts the query-key pairs that it keeps."""
    tokens, width = config.sequence_length, config.hidden_size
    pixels = IMAGE_CHANNELS * config.patch_size**2
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    pairs = tokens * (tokens + 1) // 2 if config.causal else tokens**2

    patch_embedding = config.num_patches * pixels * width
    linears = tokens * width * (4 * width + mlp_matrices * config.mlp_hidden_size)  # qkv, out, feed-forward
    attention = 2 * pairs * width  # scores, and the mix of values
    return 2 * (patch_embedding + config.num_layers * (linears + attention))


def train_flops(config: ModelConfig) -> int:
    """Model FLOPs of one image's share of a training step: forward and backward, three times the forward pass."""
    return 3 * forward_flops(config)
