"""The loss of each sample, from what its rows give to the replica's."""

from __future__ import annotations

from torch import Tensor

from megatron_nepa.models.trunk import Trunk
from megatron_nepa.parallel.collectives import reduce_from_group
from megatron_nepa.parallel.rows import RowShard


def sample_losses(shares: Tensor, rows: RowShard, num_samples: int, trunk: Trunk) -> Tensor:
    """The loss of each of the replica's samples; equal on its tensor-parallel ranks.

    Args:
        shares: of this rank's rows in the loss, which is their sum over the replica, detached, [n].
        rows: which rows those are; every sample has equally many.
        num_samples: samples B of the replica, of which the loss is the mean.
        trunk: whose ranks share the rows.

    Returns:
        [B]; their mean is the loss.
    """
    placed = shares.new_zeros(rows.num_rows)
    stop = min(rows.first + rows.count, rows.num_rows)  # what follows is padding
    placed[rows.first : stop] = shares[: max(0, stop - rows.first)]
    losses = placed.view(num_samples, -1).sum(dim=1) * num_samples
    return reduce_from_group(losses, trunk.tensor) if trunk.sequence_parallel else losses
