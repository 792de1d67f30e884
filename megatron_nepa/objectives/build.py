"""From a run's config to the model that its objective trains."""

from __future__ import annotations

from megatron_nepa.config import AimObjective, JepaObjective, MaeObjective, NepaObjective, PretrainingConfig
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.aim import AimForPretraining
from megatron_nepa.objectives.jepa import JepaForPretraining
from megatron_nepa.objectives.mae import MaeForPretraining
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.objectives.objective import PretrainingModel


def build_objective(run: PretrainingConfig, build: Build) -> PretrainingModel:
    """The freshly initialised model of ``run.objective``."""
    match run.objective:
        case NepaObjective():
            return NepaForPretraining(run.model, run.objective, build)
        case AimObjective():
            return AimForPretraining(run.model, run.objective, build)
        case MaeObjective():
            return MaeForPretraining(run.model, run.objective, build)
        case JepaObjective():
            return JepaForPretraining(run.model, run.objective, build)
