"""Health of a batch of embeddings: a collapse shows here before the loss tells."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ROWS = 256


class EmbeddingHealth(NamedTuple):
    """How a batch of embeddings spreads over directions.

    Attributes:
        std: mean over dimensions of the unit vectors' standard deviation, times sqrt(D): 1 for isotropic embeddings, 0
            for collapsed ones.
        effective_rank: exp of the entropy of the normalised singular values of the matrix of unit vectors (Roy &
            Vetterli, 2007; as a measure of collapse: Garrido et al., RankMe, 2023): the number of directions in use, 1
            where all vectors are the same.
        mean_direction: squared norm of the mean unit vector: 0 where directions cancel, 1 where all are the same.
    """

    std: float
    effective_rank: float
    mean_direction: float


@torch.no_grad()
def embedding_health(rows: Tensor) -> Tensor:
    """What :func:`read_health` needs, computed on the device of ``rows`` without any host read.

    Args:
        rows: embeddings [m, D] of any floating dtype; at most 256 of them, spread over all, are used.

    Returns:
        fp32 [2 + r * r] with r = min(m, 256): the std, the squared norm of the mean direction, the Gram matrix of the
        unit vectors.
    """
    count, width = rows.shape
    if count > MAX_ROWS:
        index = torch.arange(MAX_ROWS, device=rows.device) * _spreading_stride(count) % count
        rows = rows[index]
    # in fp64: a TF32 product would add its rounding to every eigenvalue, and these are 256 rows
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    mean = unit.mean(dim=0)
    std = (unit - mean).square().mean(dim=0).sqrt().mean() * math.sqrt(width)
    return torch.cat((torch.stack((std, mean.square().sum())), (unit @ unit.T).flatten())).float()


def health_size(rows: Tensor) -> int:
    """Elements of what :func:`embedding_health` returns."""
    return 2 + min(rows.shape[0], MAX_ROWS) ** 2


def read_health(flat: Tensor) -> EmbeddingHealth:
    """The measures from a host copy of :func:`embedding_health`'s tensor; nan where an embedding was not finite."""
    std, mean_direction = flat[:2].tolist()
    if not bool(torch.isfinite(flat).all()):
        return EmbeddingHealth(math.nan, math.nan, math.nan)
    count = math.isqrt(flat.numel() - 2)
    energies = torch.linalg.eigvalsh(flat[2:].view(count, count).double())
    # what the fp32 rounding of the Gram matrix adds is no direction
    energies = torch.where(energies > 1e-6 * energies.max(), energies, 0.0)
    singular_values = energies.sqrt()
    entropy = torch.special.entr(singular_values / singular_values.sum()).sum()
    return EmbeddingHealth(std, math.exp(entropy.item()), mean_direction)


def _spreading_stride(count: int) -> int:
    # Near the golden section of count, successive multiples spread over all rows; without a common factor they also
    # spread over the positions of a sample, where an even stride that T divides would meet the same one every time.
    stride = int(count * 0.6180339887)
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride
