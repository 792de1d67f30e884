"""Model FLOPs of each objective, counted without torch: the planner asks, too."""

from __future__ import annotations

from megatron_nepa.config import NepaObjective, PretrainingConfig
from megatron_nepa.models.flops import train_flops


def pretraining_flops(run: PretrainingConfig) -> int:
    """FLOPs of one image's share of a training step, with what the objective adds to the trunk.

    See :mod:`megatron_nepa.models.flops` for what is counted.
    """
    match run.objective:
        case NepaObjective():
            return train_flops(run.model)
