"""Linear layers split over the tensor-parallel ranks (Shoeybi et al. 2019; Korthikanti et al. 2022 for the row shards).

With one rank they are plain linears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_nepa.config import ParallelConfig
from megatron_nepa.parallel.collectives import start_all_gather, wait
from megatron_nepa.parallel.parameters import ParameterLayout, parameter
from megatron_nepa.parallel.products import (
    gathered_product,
    gathered_product_backward,
    replicated_product_backward,
    scattered_product,
    summed_product,
)
from megatron_nepa.parallel.topology import TensorGroup


class ColumnParallelLinear(nn.Module):
    """``x W^T + b`` with the output columns split over the ranks.

    Args:
        in_features: width of the whole layer's input.
        out_features: width of the whole layer's output.
        tensor: the ranks that share it.
        parallel: under sequence parallelism the input is this rank's rows [n, in] rather than all rows [N, in].
        sections: independent outputs fused in one product (3 for q, k, v); each is split, so this rank's columns
            are its share of the first section, then of the second, and so on.
    """

    def __init__(
        self, in_features: int, out_features: int, tensor: TensorGroup, parallel: ParallelConfig, sections: int = 1
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.parallel = parallel
        layout = ParameterLayout(split_dim=0, sections=sections)
        self.weight = parameter((out_features // tensor.size, in_features), "local", layout)
        self.bias = parameter((out_features // tensor.size,), "local", layout, constant=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [N, out / size], N being n * size under sequence parallelism and n elsewhere."""
        tensor = self.tensor
        if tensor.size == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.parallel.sequence_parallel:
            chunks = self.parallel.num_chunks(x.shape[0] * tensor.size, x.shape[1] * x.element_size())
            output: Tensor = _GatheredProduct.apply(x, self.weight, self.bias, tensor.size, tensor.name, chunks)
        else:
            output = _ReplicatedProduct.apply(x, self.weight, self.bias, tensor.name)
        return output


class RowParallelLinear(nn.Module):
    """``x W^T`` with the input columns split over the ranks; the bias is left to the caller, who fuses its addition.

    Args:
        in_features: width of the whole layer's input.
        out_features: width of the whole layer's output.
        tensor: the ranks that share it.
        parallel: under sequence parallelism it returns this rank's rows rather than all rows.
    """

    def __init__(self, in_features: int, out_features: int, tensor: TensorGroup, parallel: ParallelConfig) -> None:
        super().__init__()
        self.tensor = tensor
        self.parallel = parallel
        layout = ParameterLayout(split_dim=1)
        self.weight = parameter((out_features, in_features // tensor.size), "local", layout)
        self.bias = parameter((out_features,), "rows", constant=0.0)  # added to this rank's rows

    def forward(self, x: Tensor) -> Tensor:
        """[N, in / size] to [n, out] without the bias, n being N / size under sequence parallelism and N elsewhere."""
        weight, tensor = self.weight, self.tensor
        if tensor.size == 1:
            return nn.functional.linear(x, weight)
        chunks = self.parallel.num_chunks(x.shape[0], weight.shape[0] * x.element_size())
        shares: Tensor = _Shares.apply(x, weight)
        output: Tensor = _Sum.apply(
            shares, x.detach(), weight.detach(), tensor.size, tensor.name, self.parallel.sequence_parallel, chunks
        )
        return output


class _GatheredProduct(torch.autograd.Function):
    """A column-parallel layer's product of rows that the ranks share; only this rank's are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, size: int, group: str, chunks: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.group = size, group
        return gathered_product(x, weight, bias, size, group, chunks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        return *gathered_product_backward(grad, x, weight, ctx.size, ctx.group), None, None, None


class _ReplicatedProduct(torch.autograd.Function):
    """A column-parallel layer's product of rows that every rank holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *replicated_product_backward(grad, x, weight, ctx.group), None


class _Shares(torch.autograd.Function):
    """A rank's shares ``x W^T`` of a row-parallel layer's output [N, out], as its backward pass sees them.

    The forward pass computes nothing, which :class:`_Sum` does: so what the backward pass needs is kept before any
    product, and activation checkpointing, which calls again up to the last tensor that is kept, repeats neither product
    nor collective.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(1, 1).expand(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class _Sum(torch.autograd.Function):
    """The sum of all ranks' :class:`_Shares`, of this rank's rows under sequence parallelism."""

    @staticmethod
    def forward(
        ctx: Any, shares: Tensor, x: Tensor, weight: Tensor, size: int, group: str, sequence_parallel: bool, chunks: int
    ) -> Tensor:
        ctx.size, ctx.group, ctx.sequence_parallel = size, group, sequence_parallel
        if sequence_parallel:
            return scattered_product(x, weight, size, group, chunks)
        return summed_product(x, weight, group, chunks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        if ctx.sequence_parallel:
            grad = wait(start_all_gather(grad, ctx.size, ctx.group))
        return grad, None, None, None, None, None, None
