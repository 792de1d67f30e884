"""What each objective of pre-training configures; the recipe chooses the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_nepa.config.checks import require


@dataclass(frozen=True)
class NepaObjective:
    """The next-embedding objective and its ablations (paper section 3.1, table 1)."""

    name: Literal["nepa"] = field(default="nepa", init=False)
    # predict the next patch's embedding; off, each patch predicts itself (diverges, table 1a)
    shift: bool = True
    # no gradient through the target; off, the embeddings collapse (table 1a)
    stop_gradient: bool = True
    # share of input patches replaced by a learned mask token; targets stay unmasked (table 1c)
    mask_ratio: float = 0.0

    def __post_init__(self) -> None:
        require(0.0 <= self.mask_ratio < 1.0, f"objective.mask_ratio is {self.mask_ratio}; it must lie in [0, 1).")


ObjectiveConfig = NepaObjective
