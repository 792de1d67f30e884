"""Collectives with gradients, over the tensor-parallel group.

Every function is the identity where the group has one rank. "Rows" is dimension 0 of an [N, D] tensor.

| function | forward | backward |
|---|---|---|
| :func:`reduce_from_group` | all-reduce | identity |
| :func:`gather_rows` | all-gather | own rows |
| :func:`reduce_scatter_rows` | reduce-scatter | all-gather |
| :func:`all_reduce_gradients` | identity | one flat all-reduce |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_nepa.parallel.topology import TensorGroup


def reduce_from_group(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Sum every rank's share into a replicated tensor."""
    return x if tensor.size == 1 else _Reduce.apply(x, tensor)


def gather_rows(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Join the ranks' rows [n, D] into replicated rows [n * size, D], whose gradient is equal on all ranks."""
    return x if tensor.size == 1 else _GatherRows.apply(x, tensor)


def reduce_scatter_rows(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Sum every rank's share of [n * size, D] and keep this rank's rows [n, D]."""
    return x if tensor.size == 1 else _ReduceScatterRows.apply(x, tensor)


def all_reduce_gradients(parameters: Sequence[Tensor | None], tensor: TensorGroup) -> list[Tensor | None]:
    """Replicated parameters whose gradient each rank computes a share of; the shares are summed in one collective.

    Part of the autograd graph, so no set-up step can forget it; DeepSpeed does not do it (it reduces over the
    data-parallel group only).

    Args:
        parameters: tensors of one dtype; None entries are passed through.
        tensor: the ranks.
    """
    present = [p for p in parameters if p is not None]
    if tensor.size == 1 or not present:
        return list(parameters)
    summed = iter(_SumGradients.apply(tensor, *present))
    return [None if p is None else next(summed) for p in parameters]


def all_gather_rows_async(x: Tensor, tensor: TensorGroup) -> tuple[Tensor, dist.Work]:
    """Start joining the ranks' rows (no gradient); wait on the second result before the first is read."""
    out = x.new_empty(x.shape[0] * tensor.size, *x.shape[1:])
    work = dist.all_gather_into_tensor(out, x.contiguous(), group=tensor.group, async_op=True)
    assert work is not None  # this rank is in its own group
    return out, work


def reduce_scatter_rows_async(x: Tensor, tensor: TensorGroup) -> tuple[Tensor, dist.Work]:
    """Start summing over the ranks and keeping this rank's rows (no gradient); wait before reading."""
    out = x.new_empty(x.shape[0] // tensor.size, *x.shape[1:])
    work = dist.reduce_scatter_tensor(out, x.contiguous(), group=tensor.group, async_op=True)
    assert work is not None
    return out, work


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=tensor.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.rank, ctx.rows = tensor.rank, x.shape[0]
        out, work = all_gather_rows_async(x, tensor)
        work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(0, ctx.rank * ctx.rows, ctx.rows), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        out, work = reduce_scatter_rows_async(x, tensor)
        work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, work = all_gather_rows_async(grad, ctx.tensor)
        work.wait()
        return out, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.tensor = tensor
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = _flatten_dense_tensors(grads)
        dist.all_reduce(flat, group=ctx.tensor.group)
        return None, *_unflatten_dense_tensors(flat, grads)
