"""Sequence parallelism as a shard of token rows.

A replica's activations are [N, D] with N = B * T rows in batch-major order. Sequence parallelism gives every
tensor-parallel rank a contiguous run of ceil(N / size) rows; the last rank's run may end in padding. Where the size
divides the batch a run is whole samples; elsewhere it cuts one, and the last row's target is then the next rank's first
row (the halo).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nepa.parallel.collectives import all_reduce_gradients, gather_rows
from megatron_nepa.parallel.topology import TensorGroup


@dataclass(frozen=True)
class RowShard:
    """The rows of a replica that one rank holds between its parallel layers.

    Attributes:
        num_rows: rows N of the replica, without padding.
        first: number of this rank's first row.
        count: rows that this rank holds, padding included.
    """

    num_rows: int
    first: int
    count: int

    def take(self, rows: Tensor, halo: int = 0) -> Tensor:
        """This rank's rows, and ``halo`` rows after them, of a tensor that holds all N; zeros past the end."""
        stop = self.first + self.count + halo
        present = rows[self.first : min(stop, self.num_rows)]
        missing = self.count + halo - present.shape[0]
        return present if missing == 0 else torch.cat((present, rows.new_zeros(missing, *rows.shape[1:])))

    def sample_of_row(self, period: int, num_samples: int, device: torch.device) -> Tensor:
        """Batch position of each row's sample, int64 [count]; padding repeats the last."""
        row = torch.arange(self.first, self.first + self.count, device=device)
        return (row // period).clamp_(max=num_samples - 1)


def shard_rows(num_rows: int, tensor: TensorGroup, sequence_parallel: bool) -> RowShard:
    """The rows of this rank: all of them without sequence parallelism, its contiguous run with it."""
    if not sequence_parallel:
        return RowShard(num_rows, first=0, count=num_rows)
    count = -(-num_rows // tensor.size)
    return RowShard(num_rows, first=tensor.rank * count, count=count)


def place_rows(
    local: Tensor, is_share: bool, rows: RowShard, tensor: TensorGroup, sequence_parallel: bool, halo: int = 0
) -> Tensor:
    """Rows made from the images that a tensor-parallel rank was given, as the rows that it keeps.

    Args:
        local: rows of whole samples, [b T, ...]: of this rank's share of the images, or of all of them.
        is_share: whether they are of a share.
        rows: the rows that this rank keeps.
        tensor: the ranks.
        sequence_parallel: whether each keeps its run of rows, rather than all.
        halo: rows after them that are kept too, where a run cuts a sample.

    Returns:
        [n, ...], or [n + halo, ...] where the rows were cut.
    """
    if not is_share:
        return rows.take(local, halo) if sequence_parallel else local
    return local if sequence_parallel else gather_rows(local, tensor)  # a share is this rank's run


def join_rows(own: Tensor, num_rows: int, tensor: TensorGroup) -> Tensor:
    """All of the replica's rows on every rank, each of which uses a share of them: the shares' gradients are summed.

    Args:
        own: this rank's run of them, padding included, [n, ...].
        num_rows: how many there are without padding.
        tensor: the ranks.
    """
    (rows,) = all_reduce_gradients([gather_rows(own, tensor)[:num_rows]], tensor)
    assert rows is not None
    return rows


def holds_whole_samples(num_samples: int, tensor: TensorGroup, sequence_parallel: bool) -> bool:
    """Whether sequence parallelism gives every rank an equal number of whole samples, rather than cutting one."""
    return sequence_parallel and num_samples % tensor.size == 0
