"""What each objective of pre-training configures; the recipe chooses the objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from megatron_nepa.config.checks import multiples_around, one_of, require
from megatron_nepa.config.jepa import JepaObjective
from megatron_nepa.config.model import ModelConfig
from megatron_nepa.config.sections import ParallelConfig


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

    def head_sizes(self) -> tuple[int, ...]:
        """Widths of the attention heads that it adds to the trunk's: none."""
        return ()

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Refuse a model that the objective cannot train: there is none."""


@dataclass(frozen=True)
class AimObjective:
    """The pixels of the next patch from the causal trunk (El-Nouby et al. 2024)."""

    name: Literal["aim"] = field(default="aim", init=False)
    # attend in both directions in a prefix of random length, which is not predicted; off, attention is causal alone
    prefix: bool = True
    # feed-forward layers of the head, of the trunk's width and kind (the paper's head has 12 of width 2048)
    head_layers: int = 2
    # predict each patch's pixels brought to mean 0 and variance 1
    normalize_targets: bool = True

    def __post_init__(self) -> None:
        require(self.head_layers >= 0, f"objective.head_layers is {self.head_layers}; it must not be negative.")

    def head_sizes(self) -> tuple[int, ...]:
        """Widths of the attention heads that it adds to the trunk's: none."""
        return ()

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Refuse a model that the objective cannot train."""
        require(
            model.causal, "the objective aim predicts the next patch, which model.causal false would show: drop it."
        )


@dataclass(frozen=True)
class MaeObjective:
    """The pixels of masked patches from the visible ones (He et al. 2022)."""

    name: Literal["mae"] = field(default="mae", init=False)
    # share of the patches that the trunk does not see
    mask_ratio: float = 0.75
    # width of the decoder
    decoder_hidden_size: int = 512
    # blocks of the decoder, of the trunk's kind
    decoder_layers: int = 8
    # attention heads of the decoder
    decoder_heads: int = 16
    # feed-forward width of the decoder
    decoder_mlp_hidden_size: int = 2048
    # predict each patch's pixels brought to mean 0 and variance 1
    normalize_targets: bool = True

    def __post_init__(self) -> None:
        require(0.0 < self.mask_ratio < 1.0, f"objective.mask_ratio is {self.mask_ratio}; it must lie between 0 and 1.")
        for name in ("decoder_hidden_size", "decoder_layers", "decoder_heads", "decoder_mlp_hidden_size"):
            require(getattr(self, name) >= 1, f"objective.{name} is {getattr(self, name)}; it must be at least 1.")

    def num_visible(self, num_patches: int) -> int:
        """Patches of an image that the trunk sees."""
        return int(num_patches * (1 - self.mask_ratio))

    def decoder_model(self, trunk: ModelConfig) -> ModelConfig:
        """The decoder's shape: blocks of the trunk's kind, with fixed positions and neither DropPath nor rescale."""
        return replace(
            trunk,
            hidden_size=self.decoder_hidden_size,
            num_layers=self.decoder_layers,
            num_heads=self.decoder_heads,
            mlp_hidden_size=self.decoder_mlp_hidden_size,
            position_embedding="sincos",
            drop_path=0.0,
            rope_rescale=None,
        )

    def head_sizes(self) -> tuple[int, ...]:
        """Widths of the attention heads that it adds to the trunk's."""
        return (self.decoder_hidden_size // self.decoder_heads,)

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Refuse a model that the objective cannot train."""
        require(
            not model.causal,
            "the objective mae shows the trunk a few patches without an order: set model.causal to false.",
        )
        visible = self.num_visible(model.num_patches)
        require(
            0 < visible < model.num_patches,
            f"objective.mask_ratio {self.mask_ratio} leaves {visible} of {model.num_patches} patches visible: take one "
            "that leaves some, and masks some.",
        )
        width, heads, unit = self.decoder_hidden_size, self.decoder_heads, 4 if model.rope else 1
        require(
            width % heads == 0 and width // heads % unit == 0 and width % 4 == 0,
            f"objective.decoder_hidden_size {width} must be a multiple of 4, for its positions, and divide into "
            f"objective.decoder_heads {heads} heads of a width divisible by {unit}: take decoder_hidden_size "
            f"{one_of(multiples_around(width, math.lcm(heads * unit, 4)))}.",
        )
        size = parallel.tensor_parallel_size
        require(
            heads % size == 0 and self.decoder_mlp_hidden_size % size == 0,
            f"tensor_parallel_size {size} does not divide objective.decoder_heads {heads} and "
            f"objective.decoder_mlp_hidden_size {self.decoder_mlp_hidden_size}: take a size that divides both.",
        )


ObjectiveConfig = NepaObjective | AimObjective | MaeObjective | JepaObjective
OBJECTIVES: tuple[type[ObjectiveConfig], ...] = get_args(ObjectiveConfig)


def read_objective(run: Mapping[str, Any]) -> ObjectiveConfig | None:
    """The objective of a run as its checkpoint describes it; None where it is none of pre-training.

    Args:
        run: the config as nested plain values; an objective without a name is NEPA's, which was once the only one.
    """
    values = run.get("objective")
    if values is None:
        return None
    name = values.get("name", "nepa")
    found = [objective for objective in OBJECTIVES if objective().name == name]
    require(bool(found), f"the checkpoint is of the objective {name!r}, which this release does not have.")
    known = {entry.name for entry in fields(found[0]) if entry.init}
    return found[0](**{key: value for key, value in values.items() if key in known})
