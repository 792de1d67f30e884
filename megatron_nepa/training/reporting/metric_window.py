"""Numbers that :mod:`megatron_nepa.training.step` makes, kept on the device until the log asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.reporting.non_finite import ranks_not_finite

Row = dict[str, float | int]


class MetricWindow:
    """Rows of the steps since the last :meth:`read`: host numbers, and device scalars that nobody has waited for.

    Args:
        topology: the scalars are averaged over its data-parallel ranks when they are read.

    Attributes:
        not_finite: of the steps last read, those with a scalar that is not finite, and the data-parallel ranks whose
            own was not (none where only the gradient norm, which is common to all, was not).
    """

    def __init__(self, topology: Topology) -> None:
        self.names: list[str] = []  # of the device scalars of all steps
        self.topology = topology
        self.not_finite: dict[int, list[int]] = {}
        self._rows: list[Row] = []
        self._scalars: list[Tensor] = []
        self._present: list[tuple[str, ...]] = []  # names of each step's scalars

    def __len__(self) -> int:
        """Steps since the last reading."""
        return len(self._rows)

    def add(self, row: Row, scalars: Mapping[str, Tensor]) -> None:
        """Add a step: its host numbers, and its device scalars, fp32 [] or [1], by the same names on every rank."""
        self.names += [name for name in scalars if name not in self.names]
        self._rows.append(row)
        self._present.append(tuple(scalars))
        first = next(iter(scalars.values())).view(1)
        values = [scalars[name].view(1) if name in scalars else torch.zeros_like(first) for name in self.names]
        self._scalars.append(torch.cat(values))

    def read(self, extra: Tensor | None = None) -> tuple[list[Row], Tensor]:
        """The complete rows, oldest first, and ``extra`` on the host; empties the window.

        Every data-parallel rank calls it: the scalars of all steps take one all-reduce and one copy to the host.

        Args:
            extra: flat fp32 device tensor that travels in the same copy.
        """
        if not self._rows:
            return [], torch.empty(0)
        # a step that came before a name was known has none of it
        own = torch.stack([nn.functional.pad(values, (0, len(self.names) - len(values))) for values in self._scalars])
        values = own.clone()
        if self.topology.data_size > 1:
            dist.all_reduce(values, group=self.topology.data_group)
            values /= self.topology.data_size
        flat = values.flatten()
        host = (flat if extra is None else torch.cat((flat, extra))).cpu()
        table = host[: flat.numel()].view(len(self._rows), len(self.names)).tolist()
        named = [
            {name: value for name, value in zip(self.names, line, strict=True) if name in present}
            for line, present in zip(table, self._present, strict=True)
        ]
        rows: list[Row] = [{**row, **scalars} for row, scalars in zip(self._rows, named, strict=True)]
        # every data-parallel rank has the same averages, so all of them come here or none
        steps = [i for i, line in enumerate(table) if not all(map(math.isfinite, line))]
        of_this_rank = [i for i, name in enumerate(self.names) if name != "grad_norm"]
        blamed = ranks_not_finite(own[steps][:, of_this_rank], self.topology) if steps else []
        self.not_finite = {int(rows[i]["step"]): ranks for i, ranks in zip(steps, blamed, strict=True)}
        self._rows, self._scalars, self._present = [], [], []
        return rows, host[flat.numel() :]
