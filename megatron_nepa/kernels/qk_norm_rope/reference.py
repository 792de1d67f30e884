"""Per-head LayerNorm of q and k followed by 2-D RoPE, on packed qkv, in the release's order."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope_reference(
    qkv: Tensor,
    angles: Tensor | None,
    scale: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: bool,
    eps: float,
) -> Tensor:
    """Normalise each head's q and k, then rotate channel pairs (j, j + d/2); v passes unchanged.

    Args:
        qkv: [B, T, 3, heads, d], the output of the fused projection.
        angles: rotation angle of every token and pair, fp32 [T, d/2], or [B, T, d/2] where samples hold other patches;
            a BOS row holds zeros. None: no rotation.
        scale: factor on the angles of each sample (RoPE rescale), fp32 [B]; None means 1.
        q_weight: weight of the queries' norm, [d]; None for the plain norm.
        k_weight: weight of the keys' norm, likewise.
        norm: whether to normalise at all.
        eps: added to the variance in fp32.

    Returns:
        A tensor like ``qkv``; statistics and rotation are fp32, rounded once.
    """
    q, k, v = qkv.unbind(2)
    q, k = (_norm_and_rotate(x, angles, scale, weight, norm, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return torch.stack((q, k, v), dim=2)


def _norm_and_rotate(
    x: Tensor, angles: Tensor | None, scale: Tensor | None, weight: Tensor | None, norm: bool, eps: float
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # [B, T, heads, d]
    if norm:
        wide_weight = None if weight is None else weight.to(wide.dtype)
        wide = torch.nn.functional.layer_norm(wide, wide.shape[-1:], wide_weight, None, eps)
    if angles is not None:
        turn = angles if scale is None else angles * scale[:, None, None]  # [T, d/2] or [B, T, d/2]
        cos, sin = turn.cos().to(wide.dtype).unsqueeze(-2), turn.sin().to(wide.dtype).unsqueeze(-2)
        first, second = wide.chunk(2, dim=-1)
        wide = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return wide.to(x.dtype)
