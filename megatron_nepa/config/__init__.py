"""Typed configuration of a run: one frozen dataclass per concern, checked when it is built.

A recipe (``megatron_nepa.recipes``) returns the config of a task, a :class:`RunConfig` with the task's own sections;
the command line replaces single fields of it. Whatever a field means is said once, in the comment above it:
``--help`` prints that comment. A value that cannot work raises :class:`ConfigError` with the numbers in the message.
"""

from megatron_nepa.config.checks import ConfigError, RankConfigError, divisors, multiples_around, one_of, require
from megatron_nepa.config.finetuning import (
    AugmentationConfig,
    ClassificationConfig,
    EvaluationConfig,
    FinetuningConfig,
    HeadConfig,
    LayerDecayConfig,
    ValidationConfig,
)
from megatron_nepa.config.flags import SHORT_NAMES, flag_of
from megatron_nepa.config.jepa import JepaObjective
from megatron_nepa.config.model import IMAGE_CHANNELS, ModelConfig
from megatron_nepa.config.modes import refuse_ignored
from megatron_nepa.config.objectives import (
    OBJECTIVES,
    AimObjective,
    MaeObjective,
    NepaObjective,
    ObjectiveConfig,
    read_objective,
)
from megatron_nepa.config.pretraining import PretrainingConfig, ProbeConfig
from megatron_nepa.config.probing import FrozenTrunkConfig, ProbingConfig
from megatron_nepa.config.run import Run, RunConfig, override
from megatron_nepa.config.sections import (
    ActivationCheckpointing,
    AverageDecay,
    DataConfig,
    Decay,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_nepa.config.segmentation import (
    IGNORED,
    CropConfig,
    MaskConfig,
    SegmentationConfig,
    SegmentationEvaluationConfig,
)

__all__ = [
    "IGNORED",
    "IMAGE_CHANNELS",
    "OBJECTIVES",
    "SHORT_NAMES",
    "ActivationCheckpointing",
    "AimObjective",
    "AugmentationConfig",
    "AverageDecay",
    "ClassificationConfig",
    "ConfigError",
    "CropConfig",
    "DataConfig",
    "Decay",
    "EvaluationConfig",
    "FinetuningConfig",
    "FrozenTrunkConfig",
    "HeadConfig",
    "JepaObjective",
    "LayerDecayConfig",
    "MaeObjective",
    "MaskConfig",
    "ModelConfig",
    "NepaObjective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PretrainingConfig",
    "ProbeConfig",
    "ProbingConfig",
    "RankConfigError",
    "Run",
    "RunConfig",
    "SegmentationConfig",
    "SegmentationEvaluationConfig",
    "ValidationConfig",
    "divisors",
    "flag_of",
    "multiples_around",
    "one_of",
    "override",
    "read_objective",
    "refuse_ignored",
    "require",
]
