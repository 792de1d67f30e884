"""QK-norm and RoPE on a CPU: a few samples at a time, whose rows stay in the cache from one pass to the next.

Plain torch makes some thirty passes over q and k, forward and backward, each through memory, and keeps several tensors
of their size; here only qkv and two numbers a row are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.kernels.cached_parts import cached_parts
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference

CACHED_BYTES = 2**19  # of queries or keys in fp32 that are worked on at once


def qk_norm_rope_cpu(
    qkv: Tensor,
    angles: Tensor | None,
    scale: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: bool,
    eps: float,
) -> Tensor:
    """Like :func:`~megatron_nepa.kernels.qk_norm_rope.reference.qk_norm_rope_reference`, whose arguments these are.

    ``--compile`` gets the reference, whose passes a compiler joins.
    """
    if torch.compiler.is_compiling():
        return qk_norm_rope_reference(qkv, angles, scale, q_weight, k_weight, norm, eps)
    turn = None if angles is None else angles if scale is None else angles * scale[:, None, None]
    out: Tensor = _QKNormRoPE.apply(qkv, turn, q_weight, k_weight, norm, eps)
    return out


class _QKNormRoPE(torch.autograd.Function):
    """The operation with the angles as they turn each token: [T, d/2], or [B, T, d/2] where samples have their own."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        turn: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        norm: bool,
        eps: float,
    ) -> Tensor:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        cos, sin = _tables(turn, wide)
        out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        out[:, :, 2].copy_(qkv[:, :, 2])
        mean, rstd = qkv.new_empty(2, *qkv[:, :, :2].shape[:-1], 1, dtype=wide)
        for part in _parts(qkv, wide):
            for i, weight in enumerate((q_weight, k_weight)):
                x = qkv[part, :, i].to(wide)  # [b, T, heads, d]
                if norm:
                    weight = None if weight is None else weight.to(wide)
                    x, mean[part, :, i], rstd[part, :, i] = torch.native_layer_norm(x, x.shape[-1:], weight, None, eps)
                _rotate(x, _of(cos, part), _of(sin, part), out[part, :, i])
        ctx.save_for_backward(qkv, turn, q_weight, k_weight, mean, rstd)
        ctx.norm = norm
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, turn, q_weight, k_weight, mean, rstd = ctx.saved_tensors
        wide = torch.promote_types(qkv.dtype, torch.float32)
        cos, sin = _tables(turn, wide)
        back = None if sin is None else -sin
        result = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        result[:, :, 2].copy_(grad[:, :, 2])
        sums = [None if weight is None else torch.zeros_like(weight, dtype=wide) for weight in (q_weight, k_weight)]
        for part in _parts(qkv, wide):
            for i, weight in enumerate((q_weight, k_weight)):
                upstream, target = grad[part, :, i].to(wide), result[part, :, i]
                if not ctx.norm:
                    _rotate(upstream, _of(cos, part), _of(back, part), target)
                    continue
                turned = torch.empty_like(upstream, memory_format=torch.contiguous_format)
                _rotate(upstream, _of(cos, part), _of(back, part), turned)
                x = qkv[part, :, i].to(wide).contiguous()
                found, weight_grad, _ = torch.ops.aten.native_layer_norm_backward(
                    turned,
                    x,
                    x.shape[-1:],
                    mean[part, :, i].contiguous(),
                    rstd[part, :, i].contiguous(),
                    None if weight is None else weight.to(wide),
                    None,
                    [True, weight is not None, False],
                )
                target.copy_(found)
                if weight is not None:
                    sums[i] += weight_grad
        grads = [total if total is None else total.to(qkv.dtype) for total in sums]
        return result, None, *grads, None, None


def _parts(qkv: Tensor, wide: torch.dtype) -> Iterator[slice]:
    """Samples that are worked on at once."""
    batch, tokens, _, heads, size = qkv.shape
    return cached_parts(batch, tokens * heads * size * wide.itemsize, CACHED_BYTES)


def _tables(turn: Tensor | None, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Cosine and sine of every pair's angle, [..., T, 1, d/2]."""
    if turn is None:
        return None, None
    return turn.cos().to(wide).unsqueeze(-2), turn.sin().to(wide).unsqueeze(-2)


def _of(table: Tensor | None, part: slice) -> Tensor | None:
    """Those of a few samples, where samples have their own."""
    return table if table is None or table.ndim == 3 else table[part]


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor) -> None:
    """Turn channel pairs (j, j + d/2) of ``x`` into ``out``, whose dtype may be narrower."""
    if cos is None or sin is None:
        out.copy_(x)
        return
    first, second = x.chunk(2, dim=-1)
    left, right = out.chunk(2, dim=-1)
    # not addcmul, whose single rounding is not the reference's
    if out.dtype == x.dtype:
        torch.mul(first, cos, out=left).sub_(second * sin)
        torch.mul(second, cos, out=right).add_(first * sin)
    else:
        left.copy_((first * cos).sub_(second * sin))
        right.copy_((second * cos).add_(first * sin))
