"""Who was to blame for a loss that is not finite: which rank, in which step, on which samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import RunConfig
from megatron_nepa.parallel.topology import Topology

_MOST_RANGES = 4


def ranks_not_finite(values: Tensor, topology: Topology) -> list[list[int]]:
    """For each step the replicas whose own numbers were not finite; collective over the data-parallel ranks.

    Args:
        values: this replica's losses and metrics before any average, [steps, names].
        topology: this rank's place.
    """
    flags = (~values.isfinite()).any(dim=1).to(torch.uint8)
    gathered = [torch.empty_like(flags) for _ in range(topology.data_size)]
    dist.all_gather(gathered, flags, group=topology.data_group)
    table = torch.stack(gathered).cpu()  # [replicas, steps]
    return [table[:, step].nonzero().flatten().tolist() for step in range(table.shape[1])]


def describe_non_finite(
    step: int, first_sample: int, replicas: Sequence[int], run: RunConfig, topology: Topology
) -> str:
    """A line that names a step's ranks and samples.

    Args:
        step: counted from 1.
        first_sample: number of that step's first sample.
        replicas: data-parallel ranks with a non-finite loss; none where only the gradient was not finite.
        run: batch sizes.
        topology: this rank's place in the run.
    """
    if not replicas:
        return (
            f"warning: step {step}: the gradient was not finite though every loss was "
            f"(samples {first_sample} to {first_sample + run.global_batch_size - 1})."
        )
    size = topology.tensor.size
    accumulation = run.accumulation_steps(topology.data_size)
    texts = []
    for replica in replicas[:_MOST_RANGES]:
        starts = [first_sample + (m * topology.data_size + replica) * run.micro_batch_size for m in range(accumulation)]
        ranges = [f"{start} to {start + run.micro_batch_size - 1}" for start in starts[:_MOST_RANGES]]
        name = f"rank {replica}" if size == 1 else f"ranks {replica * size} to {(replica + 1) * size - 1}"
        texts.append(f"{name} (samples {', '.join(ranges)}{' and on' if accumulation > _MOST_RANGES else ''})")
    more = f" and {len(replicas) - _MOST_RANGES} more" if len(replicas) > _MOST_RANGES else ""
    return f"warning: step {step}: the loss was not finite on {', '.join(texts)}{more}."
