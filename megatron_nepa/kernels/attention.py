"""Attention on packed qkv: one call, several back-ends."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_sdpa(qkv: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention through torch's SDPA.

    Args:
        qkv: [B, T, 3, heads, d].
        causal: whether a token sees only itself and the tokens before it.

    Returns:
        [B, T, heads, d] in the input's dtype, contiguous.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, d]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).contiguous()
