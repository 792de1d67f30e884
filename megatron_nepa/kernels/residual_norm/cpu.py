"""The seam between two branches on a CPU: a few rows at a time, which stay in the cache from one pass to the next.

Plain torch makes some fifteen passes over the stream, forward and backward, and keeps another tensor of its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.kernels.cached_parts import cached_parts
from megatron_nepa.kernels.residual_norm.reference import residual_norm_reference

CACHED_BYTES = 2**19  # of the stream that are worked on at once


def residual_norm_cpu(
    stream: Tensor,
    branch: Tensor,
    branch_bias: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Like :func:`~megatron_nepa.kernels.residual_norm.reference.residual_norm_reference`, whose arguments these are.

    ``--compile`` gets the reference, whose passes a compiler joins, and so does a stream in bf16.
    """
    arguments = (stream, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, eps)
    if torch.compiler.is_compiling() or stream.dtype != torch.float32:
        return residual_norm_reference(*arguments)
    out: tuple[Tensor, Tensor] = _ResidualNorm.apply(*arguments)
    return out


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        branch: Tensor,
        branch_bias: Tensor,
        layer_scale: Tensor | None,
        row_scale: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        rows, width = stream.shape
        total, normed = torch.empty_like(stream), stream.new_empty(rows, width, dtype=norm_weight.dtype)
        mean, rstd = stream.new_empty(2, rows, 1)
        bias, weight, shift = branch_bias.float(), norm_weight.float(), norm_bias.float()
        scale = None if layer_scale is None else layer_scale.float()
        for part in _parts(stream):
            update = branch[part].float() + bias
            if scale is not None:
                update *= scale
            if row_scale is not None:
                update *= row_scale[part, None]
            torch.add(stream[part], update, out=total[part])
            found, mean[part], rstd[part] = torch.native_layer_norm(total[part], (width,), weight, shift, eps)
            normed[part] = found
        ctx.save_for_backward(total, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, mean, rstd)
        return total, normed

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, normed_grad: Tensor) -> tuple[Tensor | None, ...]:
        total, branch, branch_bias, layer_scale, row_scale, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
        width = total.shape[1:]
        stream_grad, branch_grad = torch.empty_like(total), torch.empty_like(branch)
        bias_sum, scale_sum, weight_sum, shift_sum = total.new_zeros(4, *width)
        bias, weight, shift = branch_bias.float(), norm_weight.float(), norm_bias.float()
        scale = None if layer_scale is None else layer_scale.float()
        for part in _parts(total):
            found, weight_grad, shift_grad = torch.ops.aten.native_layer_norm_backward(
                normed_grad[part].float(), total[part], width, mean[part], rstd[part], weight, shift, [True] * 3
            )
            weight_sum += weight_grad
            shift_sum += shift_grad
            update = torch.add(found, total_grad[part], out=stream_grad[part])
            if row_scale is not None:
                update = update * row_scale[part, None]
            if scale is not None:
                scale_sum += ((branch[part].float() + bias) * update).sum(0)
                update = update * scale
            bias_sum += update.sum(0)
            branch_grad[part] = update
        scale_grad = None if layer_scale is None else scale_sum.to(layer_scale.dtype)
        norm_grads = weight_sum.to(norm_weight.dtype), shift_sum.to(norm_bias.dtype)
        return stream_grad, branch_grad, bias_sum.to(branch_bias.dtype), scale_grad, None, *norm_grads, None


def _parts(stream: Tensor) -> Iterator[slice]:
    return cached_parts(stream.shape[0], stream.shape[1] * stream.itemsize, CACHED_BYTES)
