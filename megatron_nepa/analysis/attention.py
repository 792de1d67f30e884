"""Attention probabilities, which fused attention never forms: recomputed for the chosen query tokens alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nepa.kernels.attention.backends import attention_sdpa


def attention_probabilities(qkv: Tensor, causal: bool, tokens: Sequence[int]) -> Tensor:
    """Softmax of ``q k^T / sqrt(d)``, one row for each chosen query token.

    The product of the rows with v equals the output of
    :func:`~megatron_nepa.kernels.attention.backends.attention_sdpa` there.

    Args:
        qkv: [B, T, 3, heads, d], after QK-norm and RoPE.
        causal: whether a token sees only itself and the tokens before it.
        tokens: positions of the query tokens, Q of them.

    Returns:
        [B, heads, Q, T] in the input's dtype, at least fp32; every row sums to 1.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    rows = torch.tensor(tokens, device=qkv.device)
    query, key = qkv[:, rows, 0].to(wide), qkv[:, :, 1].to(wide)
    scores = torch.einsum("bqhd,bthd->bhqt", query, key) / math.sqrt(qkv.shape[-1])
    if causal:
        future = torch.arange(qkv.shape[1], device=qkv.device) > rows[:, None]
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(dim=-1)


class AttentionRecorder:
    """Attention that also keeps the probabilities of chosen query tokens, layer after layer.

    It takes the place of a model's attention: ``replace(Kernels(), attention=AttentionRecorder(tokens))``. Only the
    chosen rows are formed, so memory grows with T, not with its square.

    Args:
        tokens: positions of the query tokens, Q of them.

    Attributes:
        probabilities: one [B, heads, Q, T] a call, in the order of the layers.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.probabilities: list[Tensor] = []

    def __call__(self, qkv: Tensor, causal: bool) -> Tensor:
        """The output of :func:`~megatron_nepa.kernels.attention.backends.attention_sdpa`."""
        self.probabilities.append(attention_probabilities(qkv, causal, self.tokens))
        return attention_sdpa(qkv, causal)
