"""What a linear probe configures besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_nepa.config.checks import require
from megatron_nepa.config.finetuning import EvaluationConfig
from megatron_nepa.config.pretraining import FeatureConfig, require_block
from megatron_nepa.config.run import RunConfig


@dataclass(frozen=True)
class FrozenTrunkConfig(FeatureConfig):
    """The trunk that is probed, and which of its features."""

    # its weights and its shape: a checkpoint or OUTPUT_DIR of any run, or a released model's folder
    path: str | None = None
    # which weights of a run: its average (ema) or raw
    weights: Literal["ema", "raw"] = "ema"

    def __post_init__(self) -> None:
        require(self.path != "", "trunk is empty; give a checkpoint (an unset shell variable?).")


@dataclass(frozen=True)
class ProbingConfig(RunConfig):
    """A linear classifier on the features of a frozen trunk (paper appendix E.2)."""

    trunk: FrozenTrunkConfig = field(default_factory=FrozenTrunkConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # dtype that the trunk computes in; its features and the layer that is trained on them are fp32. auto: as a training
    dtype: Literal["auto", "bf16", "fp32"] = "bf16"
    # classify the validation images by so many nearest training images, write neighbours.json and end (the bare
    # flag: 20); none trains
    knn: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_block("trunk.block", self.trunk.block, self.model.num_layers)
        require(
            self.init_from is None or self.evaluation.only,
            f"--init_from {self.init_from} is no place for the trunk, which is not trained here: give it as --trunk.",
        )
        require(not self.compile, "--compile serves trunks that are trained, not the frozen one of a probe: drop it.")
        require(self.knn is None or self.knn >= 1, f"knn is {self.knn}; it must be at least 1 neighbour.")
        require(
            self.knn is None or (self.evaluation.data is not None and not self.evaluation.only),
            "--knn compares validation images with training images: give --data and --validation_data, and no "
            "--evaluate_only.",
        )
        self.evaluation.check_model(self.model)

    @property
    def trained_dtype(self) -> Literal["bf16", "fp32"]:
        """The layer's, whatever the trunk computes in."""
        return "fp32"
