"""What the joint-embedding predictive objective configures (I-JEPA: Assran et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_nepa.config.checks import require, require_finite
from megatron_nepa.config.model import ModelConfig
from megatron_nepa.config.sections import AverageDecay, OptimizerConfig, ParallelConfig


@dataclass(frozen=True)
class JepaObjective:
    """Predict the features of blocks of patches from those of the patches around them (I-JEPA, appendix A)."""

    name: Literal["jepa"] = field(default="jepa", init=False)
    # width of the predictor
    predictor_hidden_size: int = 384
    # blocks of the predictor
    predictor_num_layers: int = 6
    # attention heads of the predictor
    predictor_num_heads: int = 12
    # target blocks of an image
    num_targets: int = 4
    # least share of the image that a target block covers
    target_scale_min: float = 0.15
    # largest share of the image that a target block covers
    target_scale_max: float = 0.2
    # least height of a target block over its width
    target_aspect_min: float = 0.75
    # largest height of a target block over its width
    target_aspect_max: float = 1.5
    # least share of the image that the context block covers, before the target blocks are cut out; at most all of it
    context_scale_min: float = 0.85
    # share of the image's patches that the encoder sees: a fixed number of those left of the context block
    context_ratio: float = 0.25
    # decay of the weights' average, whose features are the targets, at the first step; it rises linearly to 1, and
    # optimizer.ema_decay must equal it
    momentum: float = 0.996

    def __post_init__(self) -> None:
        require_finite(self, "objective.")
        for name in ("predictor_hidden_size", "predictor_num_layers", "predictor_num_heads", "num_targets"):
            require(getattr(self, name) >= 1, f"objective.{name} is {getattr(self, name)}; it must be at least 1.")
        require(
            self.predictor_hidden_size % math.lcm(4, self.predictor_num_heads) == 0,
            f"objective.predictor_hidden_size {self.predictor_hidden_size} must be a multiple of 4, for its positions, "
            f"and of objective.predictor_num_heads {self.predictor_num_heads}.",
        )
        require(
            0 < self.target_scale_min <= self.target_scale_max < 1,
            f"objective.target_scale_min {self.target_scale_min} and target_scale_max {self.target_scale_max} must "
            "stand in that order in (0, 1).",
        )
        require(
            0.01 <= self.target_aspect_min <= self.target_aspect_max <= 100,
            f"objective.target_aspect_min {self.target_aspect_min} and target_aspect_max {self.target_aspect_max} "
            "must stand in that order in [0.01, 100].",
        )
        for name in ("context_scale_min", "context_ratio"):
            value = getattr(self, name)
            require(0 < value <= 1, f"objective.{name} is {value}; it must lie in (0, 1].")
        require(
            0 < self.momentum < 1,
            f"objective.momentum is {self.momentum}; it must lie in (0, 1): the targets are an average's features.",
        )

    def average_decay(self, total_steps: int) -> AverageDecay:
        """How the targets' average follows the weights of a run of that many steps (I-JEPA's schedule)."""
        return AverageDecay(self.momentum, rise_steps=total_steps)

    def block_sides(self, scale: float, aspect: float, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a block of patches in an image of ``height`` x ``width`` of them, at least 1 each.

        Args:
            scale: share of the image's patches.
            aspect: rows over columns.
            height: rows of patches of the image.
            width: its columns.
        """
        patches = int(scale * height * width)
        rows, columns = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
        return min(max(rows, 1), height), min(max(columns, 1), width)

    def mean_block_sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a target block of mean scale and aspect."""
        scale = (self.target_scale_min + self.target_scale_max) / 2
        aspect = (self.target_aspect_min + self.target_aspect_max) / 2
        return self.block_sides(scale, aspect, height, width)

    def num_context(self, num_patches: int) -> int:
        """Patches of an image that the encoder sees: the same at every step and of every sample."""
        return max(1, round(self.context_ratio * num_patches))

    def predictor_model(self, trunk: ModelConfig) -> ModelConfig:
        """The predictor's shape: blocks of the trunk's kind with fixed positions, without DropPath and RoPE."""
        width = self.predictor_hidden_size
        return replace(
            trunk,
            hidden_size=width,
            num_layers=self.predictor_num_layers,
            num_heads=self.predictor_num_heads,
            mlp_hidden_size=trunk.mlp_hidden_size * width // trunk.hidden_size,
            rope=False,
            rope_rescale=None,
            position_embedding="sincos",
            drop_path=0.0,
        )

    def head_sizes(self) -> tuple[int, ...]:
        """Widths of the attention heads that it adds to the trunk's."""
        return (self.predictor_hidden_size // self.predictor_num_heads,)

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Refuse a model that the objective cannot train."""
        require(
            not model.causal,
            "the objective jepa shows the trunk a few patches without an order: set model.causal to false.",
        )
        require(
            not model.bos_token,
            "the objective jepa predicts the features of patches: set model.bos_token to false, and start from no "
            "checkpoint that has one.",
        )
        require(
            model.mlp_hidden_size * self.predictor_hidden_size >= model.hidden_size,
            f"model.mlp_hidden_size {model.mlp_hidden_size} leaves the predictor's feed-forward layers no width: "
            "raise it.",
        )
        predictor = self.predictor_model(model)
        require(
            predictor.mlp_hidden_size * model.hidden_size == model.mlp_hidden_size * predictor.hidden_size,
            f"the predictor's feed-forward width, model.mlp_hidden_size {model.mlp_hidden_size} x "
            f"objective.predictor_hidden_size {self.predictor_hidden_size} / model.hidden_size {model.hidden_size}, is "
            "no whole number: take another objective.predictor_hidden_size.",
        )
        size = parallel.tensor_parallel_size
        require(
            predictor.num_heads % size == 0 and predictor.mlp_hidden_size % size == 0,
            f"tensor_parallel_size {size} does not divide objective.predictor_num_heads {predictor.num_heads} and the "
            f"predictor's feed-forward width {predictor.mlp_hidden_size}: take a size that divides both.",
        )
        self._check_grid(model.grid_size)

    def check_average(self, optimizer: OptimizerConfig) -> None:
        """Refuse a weight average that is not the targets'."""
        require(
            optimizer.ema_decay == self.momentum,
            "the targets of the objective jepa come from the run's weight average, whose decay rises from "
            f"objective.momentum {self.momentum:g} to 1: set optimizer.ema_decay to {self.momentum:g}, not "
            f"{optimizer.ema_decay:g}.",
        )
        require(
            not optimizer.ema_warmup,
            "the weight average of the objective jepa has a schedule of its own, objective.momentum's: leave "
            "optimizer.ema_warmup off.",
        )

    def _check_grid(self, side: int) -> None:
        """Refuse block sizes that do not leave an image of ``side`` x ``side`` patches its context."""
        rows, columns = self.block_sides(self.context_scale_min, 1.0, side, side)
        left = max(0, rows * columns - self.most_target_patches(side, side))
        wanted = self.num_context(side**2)
        require(
            left >= wanted,
            f"objective.context_ratio {self.context_ratio} asks for {wanted} of {side} x {side} patches, but a context "
            f"block of {rows} x {columns} may have {left} left beside a target block: lower objective.context_ratio or "
            "objective.target_scale_max, raise objective.context_scale_min, or cut the image into more patches.",
        )

    def most_target_patches(self, height: int, width: int) -> int:
        """Patches of the largest target block of an image of ``height`` x ``width`` of them."""
        least, most = (
            self.block_sides(self.target_scale_max, aspect, height, width)[0]
            for aspect in (self.target_aspect_min, self.target_aspect_max)
        )
        patches = int(self.target_scale_max * height * width)
        largest = 1
        for rows in range(least, most + 1):
            # the flattest block of that many rows is the widest
            aspect = max(self.target_aspect_min, (rows - 0.5) ** 2 / max(patches, 1))
            largest = max(largest, rows * self.block_sides(self.target_scale_max, aspect, height, width)[1])
        return largest
