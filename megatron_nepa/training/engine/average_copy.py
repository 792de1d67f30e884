"""A copy of the weight average, whole on every rank, for a model that computes with it while it is trained.

Under ZeRO the average lies in fp32 shards, one a data-parallel rank and parameter group. The copy is one flat tensor in
the dtype that the model computes in. Once after every optimizer step that changed the average each group's shards are
rounded and joined by one all-gather, straight to where they stay: a group's flat tensor under ZeRO is its ranks' shards
one after another, so nothing is moved again. The gather is started and waited for by the model, which can compute
something else between. A copy that has never been filled counts as out of date, which covers a resumed run; a skipped
step changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nepa.checkpoint.format.masters import Masters
from megatron_nepa.parallel.topology import Topology


class Follower(Protocol):
    """What computes with the average.

    Attributes:
        trunk: the module that holds it.
    """

    trunk: nn.Module

    def attach(self, average: AverageCopy) -> None:
        """Take the copy, before the first forward pass."""


@runtime_checkable
class ComputesWithAverage(Protocol):
    """A model whose ``targets`` compute with the average of its ``trunk``."""

    trunk: nn.Module
    targets: Follower


class AverageCopy:
    """The average of one part of a model in the dtype of its weights, 2 bytes a parameter in bf16.

    Args:
        part: the trained module whose average it is, inside the engine's model.
        prefix: its name there, with a dot at its end.
        masters: the engine's master weights.
        average: the average, beside ``masters.flats``.
        groups: the parameters of each of the optimizer's groups, in the order in which ZeRO flattens them.
        topology: this rank's place.

    Attributes:
        tensors: the copy's part of every trained parameter, by its name in ``part`` and in its shape on this rank.
            Valid after :meth:`wait`.
    """

    def __init__(
        self,
        part: nn.Module,
        prefix: str,
        masters: Masters,
        average: list[Tensor],
        groups: Sequence[Sequence[nn.Parameter]],
        topology: Topology,
    ) -> None:
        self._topology = topology
        trained = {name: param for name, param in part.named_parameters() if param.requires_grad}
        first = next(iter(trained.values()))
        self._is_sharded = hasattr(first, "_hp_mapping")  # ZeRO's; without it each rank has the average whole
        self._ranks = topology.data_size if self._is_sharded else 1
        places = self._places({prefix + name: param for name, param in trained.items()}, masters, groups)
        indices = sorted({index for index, _ in places.values()})
        self._shards = [average[index] for index in indices]
        sizes = [shard.numel() * self._ranks for shard in self._shards]
        self.flat = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._groups = dict(zip(indices, self.flat.split(sizes), strict=True))
        self.tensors: Mapping[str, Tensor] = {
            name: self._groups[index][start : start + param.numel()].view(param.shape)
            for (name, param), (index, start) in zip(trained.items(), places.values(), strict=True)
        }
        self._is_stale = True
        self._gathering: list[dist.Work] = []

    def outdate(self) -> None:
        """Say that the average has changed."""
        self._is_stale = True

    @torch.no_grad()
    def start(self) -> None:
        """Begin to fill the copy where it is out of date; a collective of the data-parallel ranks."""
        if not self._is_stale:
            return
        self._is_stale = False
        for shard, group in zip(self._shards, self._groups.values(), strict=True):
            size = shard.numel()
            if self._ranks == 1:
                group.copy_(shard.flatten())
                continue
            # rounded in place, in this rank's part of the result: the one further copy that a gather would need is none
            own = group[self._topology.data_rank * size :][:size]
            own.copy_(shard.flatten())
            work = dist.all_gather_into_tensor(group, own, group=self._topology.data_group, async_op=True)
            assert work is not None
            self._gathering.append(work)

    def wait(self) -> None:
        """Return when :attr:`tensors` hold the average; on a GPU its stream waits, not the host."""
        for work in self._gathering:
            work.wait()
        self._gathering = []

    def _places(
        self, params: Mapping[str, nn.Parameter], masters: Masters, groups: Sequence[Sequence[nn.Parameter]]
    ) -> dict[str, tuple[int, int]]:
        """The tensor of ``masters.flats`` that holds every parameter, and its first element in the joined tensor."""
        if not self._is_sharded:
            whole = {name: masters.fragments[name] for name in params}
            return {name: (fragment.flat_index, 0) for name, fragment in whole.items() if fragment is not None}
        place: dict[int, tuple[int, int]] = {}
        for index, group in enumerate(groups):
            start = 0
            for param in group:
                place[id(param)] = (index, start)
                start += param.numel()
        for name, param in params.items():
            fragment = masters.fragments[name]
            if fragment is not None:  # of this rank's shard: where DeepSpeed put it must be where it is looked for
                before = self._topology.data_rank * masters.flats[fragment.flat_index].numel()
                found = before + fragment.flat_start - fragment.param_start
                assert place[id(param)] == (fragment.flat_index, found), name
        return {name: place[id(param)] for name, param in params.items()}
