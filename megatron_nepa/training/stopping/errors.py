"""Why a training ends before its last step."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


class RankTrainingError(TrainingError):
    """One rank cannot go on, and only it knows why."""


class RunStopped(RuntimeError):
    """A signal or the end of the job's time stopped the run early; its state is saved, the same command continues."""
