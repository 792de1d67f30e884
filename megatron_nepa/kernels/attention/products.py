"""Attention of short bf16 sequences on a CPU, written as matrix products.

On sequences as long as an image's, torch's SDPA takes about twice the time of the products that it consists of, taken
for all heads at once (``tools/benchmark.py kernels`` shows both).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_TOKENS = 512  # whole matrices of scores: their bytes grow with the square of the tokens
QUERY_BLOCKS = 2  # the first block's causal queries skip the second one's keys: a quarter of the products


def attention_products(qkv: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention, like :func:`~megatron_nepa.kernels.attention.backends.attention_sdpa`.

    Scores and weights are rounded to the input's dtype; the softmax between them is fp32 inside. Only qkv is kept for
    the backward pass, which computes the weights again.

    Args:
        qkv: [B, T, 3, heads, d].
        causal: whether a token sees only itself and the tokens before it.

    Returns:
        [B, T, heads, d] in the input's dtype, contiguous.
    """
    out: Tensor = checkpoint(_attention, qkv, causal, use_reentrant=False, preserve_rng_state=False)
    return out


def _attention(qkv: Tensor, causal: bool) -> Tensor:
    batch, tokens, _, heads, size = qkv.shape
    # a matrix a head, next to one another: the products take every slice below without a copy
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, tokens, size)
    blocks = []
    rows = -(-tokens // QUERY_BLOCKS) if causal else tokens
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        seen = stop if causal else tokens
        scores = torch.bmm(q[:, start:stop], k[:, :seen].transpose(1, 2)) * size**-0.5
        if causal:
            later = torch.ones(stop - start, seen, dtype=torch.bool, device=qkv.device).triu(start + 1)
            scores = scores.masked_fill(later, float("-inf"))
        blocks.append(torch.bmm(scores.softmax(-1), v[:, :seen]))
    out = torch.cat(blocks, dim=1).view(batch, heads, tokens, size)
    return out.transpose(1, 2).contiguous()
