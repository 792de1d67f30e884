"""The NEPA loss: negative cosine between predicted and true embeddings (paper equations 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-12


def cosine_loss_reference(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Sum of ``-cos(prediction, target) / pairs`` over the pairs that this rank's rows take part in.

    Row i of ``prediction`` is row ``first_row + i`` of the replica's [B * T, D] token rows. It is paired with row
    ``i + shift`` of ``target``. The last ``shift`` rows of a sample have no partner, nor have its first ``skip`` rows,
    nor rows at or beyond ``num_rows`` (padding).

    Args:
        prediction: final LayerNorm's output, [n, D].
        target: input embeddings, [m, D] with m >= n, or n + 1 where row n - 1's partner lives on the next rank (the
            halo row). Detach it for the stop-gradient.
        shift: 1 for next-embedding prediction, 0 for the ablation.
        skip: leading rows of a sample that predict nothing (0; 1 where shift is 0 and there is a BOS token).
        period: tokens T of a sample.
        first_row: number of this rank's first row in the replica.
        num_rows: rows B * T of the replica, without padding.

    Returns:
        The loss share, fp32 scalar: the sum over a replica's ranks is the mean over its pairs. And three fp32 sums
        over this rank's pairs, detached, [3], each divided by the replica's pairs: cosine, norm of the prediction,
        norm of the target.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    row = torch.arange(prediction.shape[0], device=prediction.device) + first_row
    position = row % period
    paired = (position < period - shift) & (position >= skip) & (row < num_rows)
    pairs = num_rows // period * (period - shift - skip)

    # a row without a partner may lie past the end of the targets: clamp its index, the mask drops it
    partner = (torch.arange(prediction.shape[0], device=prediction.device) + shift).clamp(max=target.shape[0] - 1)
    y, z = prediction.to(wide), target.to(wide)[partner]
    y_norm = y.norm(dim=-1)
    z_norm = z.norm(dim=-1)
    cosine = (y * z).sum(-1) / (y_norm.clamp_min(NORM_EPS) * z_norm.clamp_min(NORM_EPS))
    cosine = torch.where(paired, cosine, 0.0)

    weight = paired.to(wide) / pairs
    health = torch.stack([cosine.sum() / pairs, (y_norm * weight).sum(), (z_norm * weight).sum()])
    return -cosine.sum() / pairs, health.detach()
