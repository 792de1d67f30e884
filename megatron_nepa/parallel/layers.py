"""Linear layers split over the tensor-parallel ranks (Shoeybi et al. 2019; Korthikanti et al. 2022 for the row shards).

With one rank they are plain linears.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nepa.parallel.collectives import (
    all_gather_rows_async,
    reduce_from_group,
    reduce_scatter_rows,
    reduce_scatter_rows_async,
)
from megatron_nepa.parallel.parameters import ParameterLayout, parameter
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
        output: Tensor = _ColumnParallelProduct.apply(x, self.weight, self.bias, self.tensor, self.sequence_parallel)
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


class _ColumnParallelProduct(torch.autograd.Function):
    """The product of a column-parallel layer, with its collectives overlapped.

    Under sequence parallelism the rows are gathered before the product; only this rank's rows are kept, and the
    backward pass gathers them again while it computes the input's gradient, then sums that gradient over the ranks
    while it computes the weight's (Korthikanti et al. 2022, section 4.2.2).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, tensor: TensorGroup, sequence_parallel: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tensor, ctx.sequence_parallel = tensor, sequence_parallel
        if sequence_parallel:
            x, work = all_gather_rows_async(x, tensor)
            work.wait()
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            x, gathering = all_gather_rows_async(x, ctx.tensor)
            grad_rows = grad @ weight
            gathering.wait()
            grad_x, summing = reduce_scatter_rows_async(grad_rows, ctx.tensor)
        else:
            grad_x = grad @ weight
            summing = dist.all_reduce(grad_x, group=ctx.tensor.group, async_op=True)
        grad_weight = grad.t() @ x
        grad_bias = grad.sum(0)
        summing.wait()
        return grad_x, grad_weight, grad_bias, None, None
