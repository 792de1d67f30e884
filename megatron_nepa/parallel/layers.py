"""Linear layers split over the tensor-parallel ranks (Shoeybi et al. 2019; Korthikanti et al. 2022 for the row shards).

With one rank they are plain linears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_nepa.parallel.collectives import reduce_from_group, reduce_scatter_rows
from megatron_nepa.parallel.parameters import ParameterLayout, parameter
from megatron_nepa.parallel.products import (
    gathered_product,
    gathered_product_backward,
    gathered_product_backward_op,
    gathered_product_op,
    replicated_product_backward,
    replicated_product_backward_op,
)
from megatron_nepa.parallel.topology import TensorGroup


class ColumnParallelLinear(nn.Module):
    """``x W^T + b`` with the output columns split over the ranks.

    Args:
        in_features: width of the whole layer's input.
        out_features: width of the whole layer's output.
        tensor: the ranks that share it.
        sequence_parallel: the input is this rank's rows [n, in] rather than all rows [N, in].
        sections: independent outputs fused in one product (3 for q, k, v); each is split, so this rank's columns
            are its share of the first section, then of the second, and so on.
    """

    def __init__(
        self, in_features: int, out_features: int, tensor: TensorGroup, sequence_parallel: bool, sections: int = 1
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel
        layout = ParameterLayout(split_dim=0, sections=sections)
        self.weight = parameter((out_features // tensor.size, in_features), "local", layout)
        self.bias = parameter((out_features // tensor.size,), "local", layout, constant=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [N, out / size], N being n * size under sequence parallelism and n elsewhere."""
        if self.tensor.size == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.sequence_parallel:
            output: Tensor = _GatheredProduct.apply(x, self.weight, self.bias, self.tensor.size, self.tensor.name)
        else:
            output = _ReplicatedProduct.apply(x, self.weight, self.bias, self.tensor.name)
        return output


class RowParallelLinear(nn.Module):
    """``x W^T`` with the input columns split over the ranks; the bias is left to the caller, who fuses its addition.

    Args:
        in_features: width of the whole layer's input.
        out_features: width of the whole layer's output.
        tensor: the ranks that share it.
        sequence_parallel: return this rank's rows rather than all rows.
    """

    def __init__(self, in_features: int, out_features: int, tensor: TensorGroup, sequence_parallel: bool) -> None:
        super().__init__()
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel
        layout = ParameterLayout(split_dim=1)
        self.weight = parameter((out_features, in_features // tensor.size), "local", layout)
        self.bias = parameter((out_features,), "rows", constant=0.0)  # added to this rank's rows

    def forward(self, x: Tensor) -> Tensor:
        """[N, in / size] to [n, out] without the bias, n being N / size under sequence parallelism and N elsewhere."""
        partial = nn.functional.linear(x, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_rows(partial, self.tensor)
        return reduce_from_group(partial, self.tensor)


class _GatheredProduct(torch.autograd.Function):
    """A column-parallel layer's product of rows that the ranks share; only this rank's are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, size: int, group: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.group = size, group
        product = gathered_product_op if torch.compiler.is_compiling() else gathered_product
        return product(x, weight, bias, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        products = gathered_product_backward_op if torch.compiler.is_compiling() else gathered_product_backward
        return *products(grad, x, weight, ctx.size, ctx.group), None, None


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
        products = replicated_product_backward_op if torch.compiler.is_compiling() else replicated_product_backward
        return *products(grad, x, weight, ctx.group), None
