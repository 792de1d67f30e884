"""What pre-training configures besides: the objective, and the probe that watches its features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_nepa.config.checks import require
from megatron_nepa.config.jepa import JepaObjective
from megatron_nepa.config.objectives import NepaObjective, ObjectiveConfig
from megatron_nepa.config.run import RunConfig
from megatron_nepa.config.sections import AverageDecay

NEIGHBOURS = 20  # that vote where no number is given, as in DINO


@dataclass(frozen=True)
class FeatureConfig:
    """Which feature of an image, of those that a trunk computes, is probed."""

    # block, counted from 0, whose output is probed; none takes the last one's after the final norm
    block: int | None = None
    # feature of an image: last, its last token, or mean, the mean of its patches
    pooling: Literal["last", "mean"] = "last"


@dataclass(frozen=True)
class ProbeConfig(FeatureConfig):
    """Nearest neighbours and a linear classifier on the trunk's features, now and then while it is pre-trained."""

    # steps between probes (one is also made at the end); 0 never probes
    every: int = 0
    # a few labelled images, in the layouts of --data
    data: str | None = None
    # labelled images to classify; none takes every other image of each class of probe_data for it
    validation_data: str | None = None
    # neighbours that vote
    neighbours: int = NEIGHBOURS
    # images of a batch on each replica
    batch_size: int = 64

    def __post_init__(self) -> None:
        require(self.every >= 0, f"probe_every is {self.every}; it must not be negative.")
        for name in ("neighbours", "batch_size"):
            require(getattr(self, name) >= 1, f"probe.{name} is {getattr(self, name)}; it must be at least 1.")
        require(
            self.every == 0 or bool(self.data),
            f"--probe_every {self.every} needs labelled images: give --probe_data (a folder for each class).",
        )
        require(
            self.every > 0 or self.data is None,
            f"--probe_data {self.data} is never probed: give the steps between probes as --probe_every.",
        )
        require(self.validation_data != "", "probe_validation_data is empty; give a folder (an unset shell variable?).")


@dataclass(frozen=True)
class PretrainingConfig(RunConfig):
    """Pre-training of a trunk by one of the objectives, without labels."""

    objective: ObjectiveConfig = field(default_factory=NepaObjective)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Those of the trunk, and of what the objective adds to it."""
        return (*super().head_sizes, *self.objective.head_sizes())

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective.check(self.model, self.parallel)
        if isinstance(self.objective, JepaObjective):
            self.objective.check_average(self.optimizer)
        require_block("probe.block", self.probe.block, self.model.num_layers)

    def average_decay(self, total_steps: int) -> AverageDecay:
        """How the weight average follows the weights: as the objective says, where its targets come from it."""
        if isinstance(self.objective, JepaObjective):
            return self.objective.average_decay(total_steps)
        return super().average_decay(total_steps)


def require_block(name: str, block: int | None, num_layers: int) -> None:
    """Refuse a block outside the trunk; None is its end."""
    require(
        block is None or 0 <= block < num_layers,
        f"{name} is {block}; the trunk's {num_layers} blocks are counted from 0 to {num_layers - 1}.",
    )
