"""Why a training ends before its last step."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


class RankTrainingError(RuntimeError):
    """One rank cannot go on, and only it knows why: the others wait for it in a collective.

    No :class:`TrainingError`, which every rank raises after the same step.
    """


class RunStopped(RuntimeError):
    """A signal or the end of the job's time stopped the run early; its state is saved, the same command continues."""
