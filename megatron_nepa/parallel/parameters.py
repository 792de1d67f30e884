"""Parameters: how one is split over the tensor-parallel ranks, how its gradient is summed, and how it is drawn.

Weights are created empty: :func:`initialize_parameters` draws the whole model's weights and keeps this rank's slice, so
any tensor-parallel size starts from the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_nepa.parallel.collectives import all_reduce_gradients
from megatron_nepa.parallel.random import derive_key
from megatron_nepa.parallel.topology import TensorGroup


@dataclass(frozen=True)
class ParameterLayout:
    """How a parameter is spread over the tensor-parallel ranks.

    The logical tensor is viewed as ``sections`` equal blocks along dimension 0 (q, k, v of a fused projection; gate and
    up of SwiGLU); each block is split along ``split_dim``. ``split_dim`` None: every rank holds the whole tensor.
    """

    split_dim: int | None = None
    sections: int = 1

    def logical_shape(self, local_shape: torch.Size, tensor_size: int) -> tuple[int, ...]:
        """Shape of the whole model's tensor, for a local shard of ``local_shape``."""
        if self.split_dim is None:
            return tuple(local_shape)
        return tuple(n * tensor_size if i == self.split_dim else n for i, n in enumerate(local_shape))

    def take_shard(self, logical: Tensor, tensor: TensorGroup) -> Tensor:
        """This rank's part of a whole tensor."""
        if self.split_dim is None:
            return logical
        blocks = logical.chunk(self.sections, dim=0) if self.sections > 1 else (logical,)
        return torch.cat([block.chunk(tensor.size, dim=self.split_dim)[tensor.rank] for block in blocks])


REPLICATED = ParameterLayout()

GradientRule = Literal["local", "whole", "rows", "heads", "images"]


def parameter(
    shape: tuple[int, ...],
    gradient: GradientRule,
    layout: ParameterLayout = REPLICATED,
    constant: float | None = None,
    std: float | None = None,
    values: Callable[[], Tensor] | None = None,
) -> nn.Parameter:
    """An fp32 parameter of this rank's ``shape`` that :func:`initialize_parameters` will fill; NaN until then.

    Args:
        shape: shape of this rank's part.
        gradient: what a rank's gradient of it covers: "local" of a split parameter, whose shard's gradient is complete;
            "whole" where every tensor-parallel rank computes all of it; "rows", "heads" or "images" where each
            computes the share of its token rows, attention heads or images, which :func:`sum_split_gradients` adds up.
        layout: how the whole tensor is split.
        constant: initial value of every element; None draws a truncated normal.
        std: standard deviation of that normal; None takes the model's.
        values: makes the initial value of a whole parameter instead, fp32 of ``shape``.
    """
    assert (gradient == "local") == (layout.split_dim is not None), "a split parameter's gradient is local"
    result = nn.Parameter(torch.full(shape, float("nan")))
    result.gradient_rule = gradient  # type: ignore[attr-defined]
    result.parallel_layout = layout  # type: ignore[attr-defined]
    result.constant = constant  # type: ignore[attr-defined]
    result.init_std = std  # type: ignore[attr-defined]
    result.initial_values = values  # type: ignore[attr-defined]
    # DeepSpeed counts marked parameters of every tensor-parallel rank, and unmarked ones of rank 0 only, in the
    # gradient norm
    result.tensor_model_parallel = layout.split_dim is not None  # type: ignore[attr-defined]
    return result


def layout_of(param: nn.Parameter) -> ParameterLayout:
    """The layout that :func:`parameter` recorded; replicated where none was."""
    layout = getattr(param, "parallel_layout", REPLICATED)
    assert isinstance(layout, ParameterLayout)
    return layout


def sum_split_gradients(
    parameters: Sequence[Tensor | None], split: Collection[str], tensor: TensorGroup
) -> list[Tensor | None]:
    """The parameters of one forward pass, with the sum of their gradients over the tensor-parallel ranks where each
    rank computes a share only: one collective for all of them.

    Args:
        parameters: made by :func:`parameter`, of one dtype; None entries are passed through.
        split: the gradient rules that are shares where the parameters are used, such as ("rows", "heads").
        tensor: the ranks.
    """
    if tensor.size == 1:  # also where a copied module's parameters have lost their rules
        return list(parameters)
    # what is not trained has no gradient to sum
    shared = [p is not None and p.requires_grad and p.gradient_rule in split for p in parameters]  # type: ignore[attr-defined]
    summed = iter(all_reduce_gradients([p for p, share in zip(parameters, shared, strict=True) if share], tensor))
    return [next(summed) if share else p for p, share in zip(parameters, shared, strict=True)]


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int, std: float, tensor: TensorGroup) -> None:
    """Fill every parameter of ``module``; each is a function of (seed, its name) alone.

    Matrices are drawn whole from a normal of standard deviation ``std``, or their own, cut at +-2 (as the release's),
    then sliced, one parameter at a time, so that any tensor-parallel size starts from the same model.
    """
    for name, param in module.named_parameters():
        constant = getattr(param, "constant", None)
        if constant is not None:
            param.fill_(constant)
            continue
        values = getattr(param, "initial_values", None)
        if values is not None:
            param.copy_(values())
            continue
        layout = layout_of(param)
        generator = torch.Generator().manual_seed(derive_key(seed, f"initialize/{name}"))
        whole = torch.empty(layout.logical_shape(param.shape, tensor.size))
        own_std = getattr(param, "init_std", None)
        nn.init.trunc_normal_(whole, std=std if own_std is None else own_std, generator=generator)
        param.copy_(layout.take_shard(whole, tensor))
