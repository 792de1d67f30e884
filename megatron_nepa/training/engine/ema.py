"""Exponential moving average of the fp32 master weights.

Ours rather than torch.optim.swa_utils' or timm's, which average whole models: this one averages the shard that ZeRO
leaves on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nepa.config import AverageDecay


class ExponentialMovingAverage:
    """An average that each rank keeps of the masters it owns; nothing is gathered to update it.

    The average starts at the weights it is given and after t applied steps moves by
    ``ema += (1 - d) * (master - ema)`` (as the release; paper section 4.1 evaluates it).

    Args:
        masters: this rank's fp32 tensors, read at every update.
        decay: gives d.
    """

    def __init__(self, masters: Sequence[Tensor], decay: AverageDecay) -> None:
        self.masters = list(masters)
        self.decay = decay
        self.tensors = [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average after applied step number ``step``, counted from 1."""
        torch._foreach_lerp_(self.tensors, self.masters, 1 - self.decay.at(step))
