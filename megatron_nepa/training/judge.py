"""Evaluation beside training: when it is due, what it finds, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_nepa.checkpoint.format.agreement import RankError, on_all_ranks, on_main_rank
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.config import AverageDecay
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.evaluation import best_of, describe_lag, evaluate_engine
from megatron_nepa.training.reporting.log import Log
from megatron_nepa.training.reporting.metrics_file import read_metrics
from megatron_nepa.training.stopping.errors import TrainingError
from megatron_nepa.training.task import Evaluator


class Judge:
    """Evaluates the weights of a run and compares them with its best checkpoint; every rank makes the same calls.

    Args:
        evaluator: that measures, or None where nothing is ever due.
        engine: with the weights.
        decay: of the weight average.
        checkpoints: the run's checkpoints.
        metrics_path: the run's metrics.jsonl, which knows what was evaluated before.
        total_steps: optimizer steps of the whole run, after which an evaluation is always due.
        log: the run's log.
    """

    def __init__(
        self,
        evaluator: Evaluator | None,
        engine: TrainingEngine,
        decay: AverageDecay,
        checkpoints: CheckpointStore,
        metrics_path: Path,
        total_steps: int,
        log: Log,
    ) -> None:
        self.evaluator, self.engine, self.decay = evaluator, engine, decay
        self.checkpoints, self.metrics_path = checkpoints, metrics_path
        self.total_steps, self.log = total_steps, log
        self.topology = engine.topology

    def is_due(self, step: int) -> bool:
        """Whether the weights after a step are evaluated."""
        evaluator = self.evaluator
        if evaluator is None or (step == 0 and not evaluator.at_start):
            return False
        return step == self.total_steps or step % evaluator.every == 0

    def lacks(self, step: int) -> bool:
        """Whether a step was due for an evaluation of which metrics.jsonl holds no result."""
        evaluator = self.evaluator
        if evaluator is None or not self.is_due(step):
            return False
        prefix, path = evaluator.prefix, self.metrics_path

        def lacking() -> bool:
            rows = read_metrics(path) if path.is_file() else []
            return not any(row["step"] == step and any(key.startswith(prefix) for key in row) for row in rows)

        # the main rank writes the file: the others may not see its newest row yet
        return on_all_ranks(self.topology, lambda: self.topology.is_main and lacking())[0]

    def decode_all(self, interrupted: Callable[[], bool]) -> None:
        """Decode what is evaluated, once, so that a damaged image is refused before the first step.

        Raises:
            RankConfigError: an image that cannot be decoded, by name.
        """
        if self.evaluator is not None:
            with self.log.waiting_for("decoding the images of the evaluation once"):
                self.evaluator.decode_all(interrupted)

    def evaluate(self, progress: Progress, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Results by their names in the log; None where the evaluation was interrupted."""
        assert self.evaluator is not None
        with self.log.waiting_for(f"evaluating after step {progress.step}"):
            results = evaluate_engine(self.engine, self.evaluator, interrupted)
        if results is None:
            self.log.message(f"the evaluation after step {progress.step} was cut short")
        elif progress.step > 0:
            steps = progress.applied_steps
            initial_share, is_young = self.decay.initial_share(steps), self.decay.is_young(steps)
            self.log.warn(describe_lag(self.evaluator, results, initial_share, is_young))
        return results

    def is_best(self, results: dict[str, float]) -> bool:
        """Whether the results are better than those of the best checkpoint."""
        best = self._best_of(results)
        if best is None:
            return False
        former = on_all_ranks(self.topology, self.checkpoints.best_value)[0]
        return former is None or best[1] > former

    def mark_best(self, checkpoint: Path, results: dict[str, float]) -> None:
        """Keep a checkpoint as the best one, by its average or its raw weights, whichever is ahead."""
        best = self._best_of(results)
        assert best is not None
        name, value = best
        try:
            on_main_rank(self.topology, lambda: self.checkpoints.mark_best(checkpoint, name, value))
        except RankError as error:
            raise TrainingError(
                f"{checkpoint}, the best so far by {name}, could not be marked as such ({error}): make room; the same "
                "command continues from there."
            ) from error
        self.log.message(f"best so far: {best[0]} {best[1]:.4f}")

    def _best_of(self, results: dict[str, float]) -> tuple[str, float] | None:
        """The result by which the best checkpoint is kept, by its name in the log."""
        assert self.evaluator is not None
        return best_of(self.evaluator, results, self.decay.is_young(self.engine.applied_steps))
