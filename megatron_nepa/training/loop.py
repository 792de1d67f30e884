"""The steps of a run, between its set-up and its end."""

from __future__ import annotations

from contextlib import nullcontext

from megatron_nepa.checkpoint.format.agreement import on_all_ranks
from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import RunConfig
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.judge import Judge
from megatron_nepa.training.lost_source import DataLostError
from megatron_nepa.training.reporting.announce import describe_failure
from megatron_nepa.training.reporting.log import Log
from megatron_nepa.training.reporting.metric_window import MetricWindow
from megatron_nepa.training.reporting.non_finite import describe_non_finite
from megatron_nepa.training.reporting.profiling import StepProfiler
from megatron_nepa.training.reporting.run_record import RunRecord
from megatron_nepa.training.saves import Saves
from megatron_nepa.training.step import StepClock, Stepper
from megatron_nepa.training.stopping.errors import TrainingError
from megatron_nepa.training.stopping.exit_codes import EXIT_TRAINING_FAILED
from megatron_nepa.training.stopping.lost_rank import LostRankWatch
from megatron_nepa.training.stopping.preemption import StopSignal, job_end_time
from megatron_nepa.training.stopping.stall import StallWatch
from megatron_nepa.training.task import Loader, Task


class TrainingLoop:
    """One optimizer step after another: when to evaluate, to write the log, to save and to stop between them.

    Every rank makes the same decisions at the same steps, since each of them is a collective.

    Args:
        run: the config.
        task: what is trained.
        engine: with the weights to start from.
        loader: this rank's micro-batches.
        rates: learning rates of the engine's parameter groups.
        record: the run's folder.
        total_steps: optimizer steps of the whole run.
        peak_flops: of this rank's device, for the MFU.
        log: the run's log.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        engine: TrainingEngine,
        loader: Loader,
        rates: LearningRates,
        record: RunRecord,
        total_steps: int,
        peak_flops: float,
        log: Log,
    ) -> None:
        self.run, self.task, self.log = run, task, log
        self.total_steps = total_steps
        self.topology = topology = engine.topology
        self.checkpoints = record.checkpoints
        self.stall = StallWatch(topology, run.stall_timeout)
        self.clock = StepClock()
        profiled = run.profiled_steps if topology.is_main else range(0)
        self.profiler = StepProfiler(profiled, record.profile_path, topology.device)
        self.stepper = Stepper(run, task, engine, loader, rates, peak_flops, self.clock, self.stall, self.profiler)
        self.judge = Judge(
            task.evaluator,
            engine,
            run.average_decay(total_steps),
            self.checkpoints,
            record.metrics_path,
            total_steps,
            log,
        )
        description = {**run.to_dict(), **({"classes": list(task.classes)} if task.classes else {})}
        self.saves = Saves(engine, record, description, run.async_save, self.clock, self.stall, log)
        self.stop = StopSignal(topology.is_main, job_end_time())
        self.window = MetricWindow(topology)

    def run_from(self, progress: Progress) -> tuple[Progress, str | None]:
        """Train to the end of the run or until it is asked to stop; where it stands then, and what stopped it."""
        if progress.step < self.total_steps:
            self.saves.require_room()
        self.log.warn(self.saves.time.warning())
        lost = LostRankWatch(self.topology, EXIT_TRAINING_FAILED, orderly=(TrainingError,))
        with self.stop, lost, self.stall, self.profiler:
            stopped_by = self.make_up_evaluation(progress)
            self.clock.restart()
            first = progress.step + 1
            while stopped_by is None and progress.step < self.total_steps:
                try:
                    progress, stopped_by = self.advance(progress, first)
                except DataLostError as error:
                    raise TrainingError(f"{error} {self.save_before_end(progress)}") from error
            if stopped_by is None or (progress.step == self.total_steps and not self.judge.lacks(progress.step)):
                return progress, None
        newest = self.checkpoints.latest()
        saved = f"saved {newest}" if newest is not None else "nothing was saved"
        stopped = f"stopped by {stopped_by} after step {progress.step}; {saved}; the same command continues from there"
        return progress, stopped

    def advance(self, progress: Progress, first: int) -> tuple[Progress, str | None]:
        """One step and what follows it; where the run stands then, and what asks it to stop.

        Args:
            progress: where the run stands.
            first: number of the first step that this process makes.
        """
        run = self.run
        number = progress.step + 1
        self.profiler.before(number)
        with self.log.waiting_for(f"waiting for step {number}, the first") if number == first else nullcontext():
            progress, applied, row, scalars = self.stepper.step(progress)
        self.window.add(row, scalars)
        self.log.advance(number)
        profile = self.profiler.after(number)
        if profile is not None:
            self.log.message(f"profile written to {profile}")
        self.stall.at("agreeing after the update", number)
        stopped_by = self.asked_to_stop()

        is_last = number == self.total_steps
        failed = progress.skipped_in_a_row >= run.max_skipped_steps
        results = None
        if self.judge.is_due(number) and stopped_by is None and not failed:
            results = self.evaluate(progress)
            stopped_by = self.asked_to_stop()
        is_best = results is not None and self.judge.is_best(results)
        saves = is_last or is_best or stopped_by is not None or number % run.save_every == 0
        if saves:
            self.saves.restore_folder(number)
        is_logged = number == first or number % run.log_every == 0
        if failed or saves or results or not applied or is_logged:
            self.write_log(progress, results or {})
        self.saves.conclude(wait=failed or saves)  # one at a time
        if failed:
            raise TrainingError(describe_failure(run, progress, self.checkpoints.latest()))
        if saves:
            path = self.saves.save(progress, wait=is_last or is_best or stopped_by is not None)
            if results is not None and is_best:
                self.judge.mark_best(path, results)
        return progress, stopped_by

    def save_before_end(self, progress: Progress) -> str:
        """Save where the run stands, if that is not done, and say what to do; every rank calls it."""
        if progress.step > 0:
            self.saves.restore_folder(progress.step)
        if len(self.window):
            self.write_log(progress, {})
        self.saves.conclude(wait=True)
        path = self.checkpoints.path_of(progress.step)
        if progress.step > 0 and not on_all_ranks(self.topology, path.is_dir)[0]:
            self.saves.save(progress, wait=True)
        newest = self.checkpoints.latest()
        saved = "Nothing was saved" if newest is None else f"Saved {newest}"
        return f"{saved}; the same command continues from step {progress.step} once it can be read again."

    def asked_to_stop(self) -> str | None:
        """What asks the run to stop, the same on every rank, or None; a collective."""
        self.stop.save_seconds = self.saves.time.seconds
        return self.stop.agreed(self.topology.host_group, self.topology.world_size)

    def evaluate(self, progress: Progress) -> dict[str, float] | None:
        """Results by their names in the log; None where a signal cut the evaluation short."""

        def interrupted() -> bool:
            self.stall.at("evaluating", progress.step)
            return self.asked_to_stop() is not None

        try:
            results = self.judge.evaluate(progress, interrupted)
        except DataLostError as error:
            raise TrainingError(f"{error} {self.save_before_end(progress)}") from error
        self.clock.restart()  # the time to evaluate is not the next step's
        return results

    def make_up_evaluation(self, progress: Progress) -> str | None:
        """Evaluate the weights that a run starts or continues from, where that is due and missing; what stopped it.

        The results get a row of their own in metrics.jsonl: step 0 has no other, that of a later step is written.
        """
        if not self.judge.lacks(progress.step):
            if progress.step < self.total_steps:
                self.judge.decode_all(lambda: self.stop.is_asked)  # the next evaluation may be hours away
            return self.asked_to_stop()
        if progress.step > 0:
            self.log.message(f"evaluating step {progress.step}, which has no result yet")
        results = self.evaluate(progress)
        if results is not None:
            self.log.write([{"step": progress.step, **results}])
            if progress.step > 0 and self.judge.is_best(results):  # nothing was trained yet that could be kept
                path = self.checkpoints.path_of(progress.step)
                if not on_all_ranks(self.topology, path.is_dir)[0]:  # continued from another folder's
                    self.saves.save(progress, wait=True)
                self.judge.mark_best(path, results)
        return self.asked_to_stop()

    def write_log(self, progress: Progress, results: dict[str, float]) -> None:
        """Write the rows since the last call, with what was measured at the last step; every rank calls it."""
        is_main = self.topology.is_main
        rows, flat = self.window.read(self.task.health() if is_main else None)
        if not is_main:
            return
        rows[-1] |= self.task.read_health(flat) | results
        self.log.write(rows)
        for step, replicas in self.window.not_finite.items():
            first_sample = progress.samples - (progress.step - step + 1) * self.run.global_batch_size
            self.log.message(describe_non_finite(step, first_sample, replicas, self.run, self.topology))
