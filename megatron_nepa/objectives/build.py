"""From the config of a trunk and of an objective to the model that is trained."""

from __future__ import annotations

from megatron_nepa.config import AimObjective, JepaObjective, MaeObjective, ModelConfig, NepaObjective, ObjectiveConfig
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.aim import AimForPretraining
from megatron_nepa.objectives.jepa import JepaForPretraining
from megatron_nepa.objectives.mae import MaeForPretraining
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.objectives.objective import PretrainingModel


def build_objective(config: ModelConfig, objective: ObjectiveConfig, build: Build) -> PretrainingModel:
    """The freshly initialised model of ``objective``, whose trunk has the shape ``config``."""
    match objective:
        case NepaObjective():
            return NepaForPretraining(config, objective, build)
        case AimObjective():
            return AimForPretraining(config, objective, build)
        case MaeObjective():
            return MaeForPretraining(config, objective, build)
        case JepaObjective():
            return JepaForPretraining(config, objective, build)
