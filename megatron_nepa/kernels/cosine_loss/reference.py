"""The NEPA loss: negative cosine between predicted and true embeddings (paper equations 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-12
_ROWS = 8192


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
    cosine, y_norm, z_norm, paired = _pair_rows(prediction, target, shift, skip, period, first_row, num_rows)
    pairs = num_rows // period * (period - shift - skip)
    weight = paired.to(cosine.dtype) / pairs
    health = torch.stack([cosine.sum() / pairs, (y_norm * weight).sum(), (z_norm * weight).sum()])
    return -cosine.sum() / pairs, health.detach()


def loss_by_sample(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> Tensor:
    """The loss of each of the replica's samples, of which this rank's rows give a part.

    Plain torch, which no fused operation replaces: only a run that asks for it pays for one more pass over the rows.

    Args:
        prediction, target, shift, skip, period, first_row, num_rows: as in :func:`cosine_loss_reference`.

    Returns:
        fp32 [num_rows / period]: the sum over a replica's ranks is each sample's mean over its pairs.
    """
    parts = [  # a few rows at a time: what they take in fp32 is not to raise a step's peak memory
        _pair_rows(
            prediction[i : i + _ROWS], target[i : i + _ROWS + shift], shift, skip, period, first_row + i, num_rows
        )[0]
        for i in range(0, prediction.shape[0], _ROWS)
    ]
    cosine = torch.cat(parts)
    stop = min(first_row + len(cosine), num_rows)  # what follows is padding
    rows = cosine.new_zeros(num_rows)
    rows[first_row:stop] = cosine[: max(0, stop - first_row)]
    return -rows.view(-1, period).sum(1) / (period - shift - skip)


def _pair_rows(
    prediction: Tensor, target: Tensor, shift: int, skip: int, period: int, first_row: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row the cosine with its target (0 without one), both norms, and whether it has one, all [n]."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    row = torch.arange(prediction.shape[0], device=prediction.device) + first_row
    position = row % period
    paired = (position < period - shift) & (position >= skip) & (row < num_rows)

    # a row without a partner may lie past the end of the targets: clamp its index, the mask drops it
    partner = (torch.arange(prediction.shape[0], device=prediction.device) + shift).clamp(max=target.shape[0] - 1)
    y, z = prediction.to(wide), target.to(wide)[partner]
    y_norm = y.norm(dim=-1)
    z_norm = z.norm(dim=-1)
    cosine = (y * z).sum(-1) / (y_norm.clamp_min(NORM_EPS) * z_norm.clamp_min(NORM_EPS))
    return torch.where(paired, cosine, 0.0), y_norm, z_norm, paired
