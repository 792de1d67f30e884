"""Collectives with gradients, over the tensor-parallel group.

Every function is the identity where the group has one rank. "Rows" is dimension 0 of an [N, D] tensor.

| function | forward | backward |
|---|---|---|
| :func:`reduce_from_group` | all-reduce | identity |
| :func:`gather_rows` | all-gather | own rows |
| :func:`all_reduce_gradients` | identity | one flat all-reduce |

What they call are torch's functional collectives, whose results are tensors from the start: ``--compile`` traces them
like any other operation, and what runs between the start of one and :func:`wait` hides it, compiled or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives  # noqa: F401  (what they return without memory, for a trace)

from megatron_nepa.parallel.topology import TensorGroup


def reduce_from_group(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Sum every rank's share into a replicated tensor."""
    return x if tensor.size == 1 else _Reduce.apply(x, tensor.name)


def gather_rows(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Join the ranks' rows [n, D] into replicated rows [n * size, D], whose gradient is equal on all ranks."""
    return x if tensor.size == 1 else _GatherRows.apply(x, tensor.rank, tensor.size, tensor.name)


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
    summed = iter(_SumGradients.apply(tensor.name, *present))
    return [None if p is None else next(summed) for p in parameters]


def start_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """Start joining the ranks' rows [n, ...] into [n * size, ...] (no gradient); :func:`wait` before reading.

    Args:
        x: this rank's rows.
        size: ranks of the group.
        group: its name.
    """
    out: Tensor = _OPERATIONS.all_gather_into_tensor(x.contiguous(), size, group)
    return out


def start_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """Start summing [n * size, ...] over the ranks and keeping this rank's rows [n, ...]; arguments as above."""
    out: Tensor = _OPERATIONS.reduce_scatter_tensor(x.contiguous(), "sum", size, group)
    return out


def start_all_reduce(x: Tensor, group: str) -> Tensor:
    """Start summing ``x`` over the ranks, in place: it must be nobody else's, and contiguous."""
    # a trace takes the sum in a tensor of its own alone; inductor puts it back in place
    all_reduce = _OPERATIONS.all_reduce if torch.compiler.is_compiling() else _OPERATIONS.all_reduce_
    out: Tensor = all_reduce(x, "sum", group)
    return out


def wait(x: Tensor) -> Tensor:
    """What a collective that was started has made of ``x``; on a GPU its stream waits, not the host."""
    out: Tensor = _OPERATIONS.wait_tensor(x)
    return out


# Below, the name of a group and its numbers stand for it: a trace takes no objects of its own.
_OPERATIONS = torch.ops._c10d_functional


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return wait(start_all_reduce(x.clone(memory_format=torch.contiguous_format), group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, size: int, group: str) -> Tensor:
        ctx.rank, ctx.rows = rank, x.shape[0]
        return wait(start_all_gather(x, size, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.narrow(0, ctx.rank * ctx.rows, ctx.rows), None, None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = wait(start_all_reduce(torch.cat([grad.reshape(-1) for grad in grads]), ctx.group))
        parts = flat.split([grad.numel() for grad in grads])
        return None, *(part.view(grad.shape) for part, grad in zip(parts, grads, strict=True))
