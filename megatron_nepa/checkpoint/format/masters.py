"""The optimizer's fp32 tensors and where each parameter lies in them.

ZeRO flattens every parameter group and gives each data-parallel rank one contiguous part of it; a parameter may lie on
one rank, on two neighbours, or (on this rank) nowhere. Without ZeRO the optimizer's tensors are the parameters. Either
way the optimizer's state and the weight average live beside these tensors, element for element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank's optimizer owns.

    Attributes:
        flat_index: which of the optimizer's tensors holds it.
        flat_start: first element there.
        param_start: first element in the flattened parameter.
        numel: number of elements.
    """

    flat_index: int
    flat_start: int
    param_start: int
    numel: int


@dataclass(frozen=True)
class Masters:
    """This rank's fp32 master weights.

    Attributes:
        optimizer: the innermost optimizer, whose state is keyed by the tensors in ``flats``.
        flats: its tensors, one a parameter group under ZeRO.
        fragments: where each trainable parameter lies, or None where this rank owns no part of it.
    """

    optimizer: torch.optim.Optimizer
    flats: list[Tensor]
    fragments: dict[str, Fragment | None]

    def companion(self, kind: str) -> list[Tensor]:
        """The optimizer's state tensors called ``kind`` ("exp_avg", "exp_avg_sq"), one for each flat."""
        return [self.optimizer.state[flat][kind] for flat in self.flats]


def view_fragment(flats: list[Tensor], fragment: Fragment) -> Tensor:
    """The part of ``flats`` that a fragment describes, as a flat view."""
    flat = flats[fragment.flat_index].detach().flatten()
    return flat[fragment.flat_start : fragment.flat_start + fragment.numel]


def fill_fragment(flats: list[Tensor], fragment: Fragment, whole: Tensor) -> None:
    """Copy into ``flats`` the part that a fragment describes of a parameter, or of a tensor of its shape."""
    part = whole.flatten()[fragment.param_start : fragment.param_start + fragment.numel]
    view_fragment(flats, fragment).copy_(part)


def join_fragments(
    param: nn.Parameter,
    fragment: Fragment | None,
    flats: list[Tensor],
    data_group: dist.ProcessGroup,
    owner: int | None = None,
) -> Tensor:
    """One parameter's fragments of all data-parallel ranks joined (a fragment plus zeros is exact); a collective.

    Args:
        param: the parameter.
        fragment: this rank's part of it, or None.
        flats: the masters, or tensors beside them.
        data_group: the data-parallel ranks.
        owner: the data-parallel rank that receives the result (the others' is of no use); None for all.

    Returns:
        fp32, in the parameter's shape.
    """
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if fragment is not None:
        whole[fragment.param_start : fragment.param_start + fragment.numel] = view_fragment(flats, fragment)
    # ZeRO spreads masters over the data-parallel ranks; without it each has them whole
    if hasattr(param, "_hp_mapping"):
        if owner is None:
            dist.all_reduce(whole, group=data_group)
        else:
            dist.reduce(whole, dist.get_global_rank(data_group, owner), group=data_group)
    return whole.view(param.shape)


def find_masters(engine: Any, model: nn.Module) -> Masters:
    """Locate the master weights of a DeepSpeed engine, for any ZeRO stage up to 2, with or without offload."""
    outer = engine.optimizer
    optimizer: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
    flats = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if optimizer is outer:
        index = {id(tensor): i for i, tensor in enumerate(flats)}
        whole = {name: Fragment(index[id(param)], 0, 0, param.numel()) for name, param in trainable.items()}
        return Masters(optimizer, flats, dict(whole))
    return Masters(optimizer, flats, {name: _zero_fragment(param) for name, param in trainable.items()})


def _zero_fragment(param: nn.Parameter) -> Fragment | None:
    mapping = getattr(param, "_hp_mapping", None)
    if mapping is None:
        return None
    inside, source = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(mapping.param_group_index, inside.start, source.start, inside.numel)
