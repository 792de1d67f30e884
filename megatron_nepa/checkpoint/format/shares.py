"""Which rank writes which tensor of a checkpoint: shares as even as whole tensors allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """What one rank writes of a logical tensor.

    Attributes:
        numel: elements, of this rank's part of a tensor that is split over the tensor-parallel ranks.
        is_split: whether it is; each of them then writes its part.
    """

    numel: int
    is_split: bool


@dataclass(frozen=True)
class Owner:
    """The rank that writes a tensor.

    Attributes:
        data_rank: among the data-parallel ranks.
        tensor_rank: among the tensor-parallel ranks, or None where all of them write a part.
    """

    data_rank: int
    tensor_rank: int | None

    def is_at(self, data_rank: int, tensor_rank: int) -> bool:
        """Whether it is the rank in this place, or one of several."""
        return data_rank == self.data_rank and self.tensor_rank in (None, tensor_rank)


def share_out(pieces: Mapping[str, Piece], data_size: int, tensor_size: int) -> dict[str, Owner]:
    """Give each tensor to the rank that has least so far, the largest first; a pure function, the same on every rank.

    Args:
        pieces: by key; every element takes the same bytes.
        data_size: data-parallel ranks.
        tensor_size: tensor-parallel ranks of each.
    """
    load = np.zeros((data_size, tensor_size), np.int64)
    owners = {}
    for key, piece in sorted(pieces.items(), key=lambda item: (-item[1].numel, item[0])):
        if piece.is_split:
            data_rank = int(load.max(axis=1).argmin())
            owners[key] = Owner(data_rank, None)
            load[data_rank] += piece.numel
        else:
            data_rank, tensor_rank = (int(place) for place in np.unravel_index(load.argmin(), load.shape))
            owners[key] = Owner(data_rank, tensor_rank)
            load[data_rank, tensor_rank] += piece.numel
    return owners


def heaviest_share(pieces: Mapping[str, Piece], data_size: int, tensor_size: int) -> int:
    """Elements that the rank with most of them writes."""
    load = np.zeros((data_size, tensor_size), np.int64)
    for key, owner in share_out(pieces, data_size, tensor_size).items():
        load[owner.data_rank, slice(None) if owner.tensor_rank is None else owner.tensor_rank] += pieces[key].numel
    return int(load.max())
