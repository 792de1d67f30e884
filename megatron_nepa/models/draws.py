"""The model's random draws in training, each a function of (seed, purpose, sample number) alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_nepa.parallel.random import derive_key, uniform_tensor


def rope_rescale_factor(rescale: float, group: int, seed: int, sample_index: Tensor) -> Tensor:
    """Factor ``exp(U(-ln rescale, ln rescale))`` on the RoPE coordinates of every sample (as the release's).

    Args:
        rescale: largest factor.
        group: consecutive samples that share one draw.
        seed: the run's seed.
        sample_index: sample numbers, int64 [B].

    Returns:
        fp32 [B].
    """
    draw = uniform_tensor(derive_key(seed, "rope_rescale"), sample_index // group, 1)[:, 0]
    return torch.exp((2 * draw - 1) * math.log(rescale))


def drop_path_factors(rate: float, num_layers: int, seed: int, sample_index: Tensor) -> Tensor:
    """Factor on every residual branch of every sample: 0 with the branch's drop rate, else 1 / keep probability.

    The rate grows linearly from 0 in the first block to ``rate`` in the last; the two branches of a block draw
    separately.

    Returns:
        fp32 [2 * num_layers, B]: attention and feed-forward branch of block 0, then of block 1, and so on.
    """
    draw = uniform_tensor(derive_key(seed, "drop_path"), sample_index, 2 * num_layers).t()
    rates = torch.linspace(0, rate, num_layers, device=draw.device).repeat_interleave(2)[:, None]
    return torch.where(draw < rates, 0.0, 1 / (1 - rates)).contiguous()


def shuffled_patches(num_patches: int, purpose: str, seed: int, sample_index: Tensor) -> Tensor:
    """The patches of every sample in a random order.

    Args:
        num_patches: patches of a sample.
        purpose: what the order is for, such as "patch_mask".
        seed: the run's seed.
        sample_index: sample numbers, int64 [B].

    Returns:
        int64 [B, num_patches], a permutation a row.
    """
    draw = uniform_tensor(derive_key(seed, purpose), sample_index, num_patches)
    # stable, so that equal draws are told apart by position
    return draw.argsort(dim=1, stable=True)


def prefix_lengths(num_patches: int, seed: int, sample_index: Tensor) -> Tensor:
    """A number of leading patches of every sample, uniform in 1 to ``num_patches - 1``, int64 [B]."""
    draw = uniform_tensor(derive_key(seed, "prefix"), sample_index, 1)[:, 0]
    return 1 + (draw.double() * (num_patches - 1)).long()


def patch_mask(ratio: float, num_patches: int, seed: int, sample_index: Tensor) -> Tensor:
    """Which patches of every sample the mask token replaces: exactly ``round(ratio * num_patches)`` (paper table 1c).

    Returns:
        bool [B, num_patches].
    """
    place = shuffled_patches(num_patches, "patch_mask", seed, sample_index).argsort(dim=1)
    return place < round(ratio * num_patches)


def channel_dropout_factors(rate: float, num_channels: int, purpose: str, seed: int, sample_index: Tensor) -> Tensor:
    """Factor on every channel of every sample: 0 with probability ``rate``, else 1 / (1 - rate) (torch's Dropout2d).

    Args:
        rate: share of channels that are dropped.
        num_channels: channels C.
        purpose: names the layer, so that two of them draw separately.
        seed: the run's seed.
        sample_index: sample numbers, int64 [B].

    Returns:
        fp32 [B, C].
    """
    draw = uniform_tensor(derive_key(seed, f"dropout/{purpose}"), sample_index, num_channels)
    return torch.where(draw < rate, 0.0, 1 / (1 - rate))
