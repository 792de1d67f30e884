"""The steps of a run, between its set-up and its end."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from megatron_nepa.checkpoint.format.agreement import on_all_ranks
from megatron_nepa.checkpoint.saving.asynchronous import CheckpointSaver
from megatron_nepa.checkpoint.saving.store import Progress, SaveError
from megatron_nepa.config import ConfigError, RunConfig
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.evaluation import best_of, describe_lag, evaluate_engine
from megatron_nepa.training.reporting.announce import describe_failure
from megatron_nepa.training.reporting.device_memory import memory_gb
from megatron_nepa.training.reporting.log import RunLog, read_metrics
from megatron_nepa.training.reporting.metric_window import MetricWindow
from megatron_nepa.training.reporting.non_finite import describe_non_finite
from megatron_nepa.training.reporting.profiling import StepProfiler
from megatron_nepa.training.reporting.run_directory import RunDirectory
from megatron_nepa.training.reporting.waiting import waiting_for
from megatron_nepa.training.stopping.errors import RankTrainingError, TrainingError
from megatron_nepa.training.stopping.exit_codes import EXIT_TRAINING_FAILED
from megatron_nepa.training.stopping.lost_rank import LostRankWatch
from megatron_nepa.training.stopping.preemption import StopSignal, job_end_time
from megatron_nepa.training.stopping.save_time import SaveTime, checkpoint_bytes
from megatron_nepa.training.stopping.stall import StallWatch
from megatron_nepa.training.task import Loader, Task


class TrainingLoop:
    """One optimizer step after another, with what is decided and written between them.

    Args:
        run: the config.
        task: what is trained.
        engine: with the weights to start from.
        loader: this rank's micro-batches.
        rates: learning rates of the engine's parameter groups.
        directory: the run's folder.
        total_steps: optimizer steps of the whole run.
        peak_flops: of this rank's device, for the MFU.
        log: the main rank's, None on the others.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        engine: TrainingEngine,
        loader: Loader,
        rates: LearningRates,
        directory: RunDirectory,
        total_steps: int,
        peak_flops: float,
        log: RunLog | None,
    ) -> None:
        self.run, self.task, self.engine, self.loader, self.rates = run, task, engine, loader, rates
        self.directory, self.checkpoints = directory, directory.checkpoints
        self.total_steps, self.log = total_steps, log
        self.topology = engine.topology
        self.flops_per_step = task.flops_per_image * run.global_batch_size / self.topology.world_size
        self.peak_flops = peak_flops
        self.step_seconds = 0.0  # of the last one
        self.window = MetricWindow(self.topology)
        self.description = {**run.to_dict(), **({"classes": list(task.classes)} if task.classes else {})}
        self.saver = CheckpointSaver(directory.checkpoints, self.topology, run.async_save)
        self.save_time = SaveTime(
            checkpoint_bytes(engine.module, self.topology.tensor.size, has_ema=engine.ema is not None)
        )
        self.stop = StopSignal(self.topology.is_main, job_end_time(), self.save_time.seconds)
        self.stall = StallWatch(self.topology, run.stall_timeout)
        profiled = run.profiled_steps if self.topology.is_main else range(0)
        self.profiler = StepProfiler(profiled, directory.profile_path, self.topology.device)

    def run_from(self, progress: Progress) -> tuple[Progress, str | None]:
        """Train to the end of the run or until it is asked to stop; where it stands then, and what stopped it."""
        run, topology = self.run, self.topology
        if self.log is not None:
            self.log.warn(self.save_time.warning())
        lost = LostRankWatch(topology, EXIT_TRAINING_FAILED, orderly=(TrainingError,))
        with self.stop, lost, self.stall, self.profiler:
            stopped_by = self.make_up_evaluation(progress)
            self.last_end = time.perf_counter()
            first = progress.step + 1
            while stopped_by is None and progress.step < self.total_steps:
                self.profiler.before(progress.step + 1)
                starts = progress.step + 1 == first
                with self.waiting_for(f"waiting for step {first}, the first") if starts else nullcontext():
                    progress, applied = self.step(progress)
                if self.log is not None:
                    self.log.advance(progress.step)
                profile = self.profiler.after(progress.step)
                if profile is not None:
                    self.message(f"profile written to {profile}")
                self.stall.at("agreeing after the update", progress.step)
                stopped_by = self.stop.agreed(topology.host_group, topology.world_size)

                is_last = progress.step == self.total_steps
                failed = progress.skipped_in_a_row >= run.max_skipped_steps
                results = None
                if self.is_due(progress.step) and stopped_by is None and not failed:
                    results = self.evaluate(progress)
                    stopped_by = self.stop.agreed(topology.host_group, topology.world_size)
                is_best = results is not None and self.is_best(results)
                saves = is_last or is_best or stopped_by is not None or progress.step % run.save_every == 0
                is_logged = progress.step == first or progress.step % run.log_every == 0
                if failed or saves or results or not applied or is_logged:
                    self.write_log(progress, results or {})
                self.conclude_save(wait=failed or saves)  # one at a time
                if failed:
                    raise TrainingError(describe_failure(run, progress, self.checkpoints.latest()))
                if saves:
                    path = self.save(progress, wait=is_last or is_best or stopped_by is not None)
                    if results is not None and is_best:
                        self.mark_best(path, results)
            if stopped_by is None or (progress.step == self.total_steps and not self.lacks_evaluation(progress.step)):
                return progress, None
        newest = self.checkpoints.latest()
        saved = f"saved {newest}" if newest is not None else "nothing was saved"
        stopped = f"stopped by {stopped_by} after step {progress.step}; {saved}; the same command continues from there"
        return progress, stopped

    def step(self, progress: Progress) -> tuple[Progress, bool]:
        """One optimizer step, and its row for the log; False where a gradient was not finite."""
        run, task, engine, topology = self.run, self.task, self.engine, self.topology
        number = progress.step + 1
        learning_rates = self.rates.at(progress.step)
        metrics: dict[str, Tensor] = {}
        data_wait = 0.0
        for micro_batch in range(engine.accumulation_steps):
            self.stall.at("waiting for data", number)
            wait_start = time.perf_counter()
            try:
                with self.profiler.part("data"):
                    batch = next(self.loader)
            except ConfigError as error:  # of this rank's images: the other ranks do not know
                raise RankTrainingError(f"rank {topology.rank}: {error}") from error
            data_wait += time.perf_counter() - wait_start
            self.stall.at("in the forward or backward pass", number)
            with self.profiler.part("forward"):
                loss, values = task.forward(engine, batch)
            with self.profiler.part("backward"):
                engine.backward(loss)
            for name, value in values.items():
                share = value / engine.accumulation_steps
                metrics[name] = metrics[name] + share if name in metrics else share
            if micro_batch < engine.accumulation_steps - 1:
                engine.end_micro_batch()
        self.stall.at("in the weight update", number)
        with self.profiler.part("optimizer"):
            result = engine.step(learning_rates)
        progress = Progress(
            step=number,
            samples=progress.samples + run.global_batch_size,
            applied_steps=engine.applied_steps,
            skipped_in_a_row=engine.skipped_in_a_row,
            order=progress.order,
        )

        now = time.perf_counter()
        seconds, self.last_end = now - self.last_end, now
        self.step_seconds = seconds
        row: dict[str, float | int] = {"step": number}
        if task.num_images is not None:
            row["epoch"] = progress.samples / task.num_images
        row |= {
            "samples": progress.samples,
            "lr": max(learning_rates.values()),
            "step_ms": seconds * 1e3,
            "data_wait_ms": data_wait * 1e3,
            "samples_per_second": run.global_batch_size / seconds,
            "tflops_per_device": self.flops_per_step / seconds / 1e12,
            "mfu": self.flops_per_step / seconds / self.peak_flops,
            "memory_gb": memory_gb(topology.device),
            "skipped_steps": number - progress.applied_steps,
            "bad_images": self.loader.num_bad_images,
        }
        self.window.add(row, {**metrics, "grad_norm": result.grad_norm})
        return progress, result.applied

    def is_due(self, step: int) -> bool:
        """Whether the weights after a step are evaluated."""
        evaluator = self.task.evaluator
        if evaluator is None or (step == 0 and not evaluator.at_start):
            return False
        return step == self.total_steps or step % evaluator.every == 0

    def lacks_evaluation(self, step: int) -> bool:
        """Whether a step was due for an evaluation of which metrics.jsonl holds no result; every rank calls it."""
        evaluator = self.task.evaluator
        if evaluator is None or not self.is_due(step):
            return False
        prefix, path = evaluator.prefix, self.directory.metrics_path

        def lacking() -> bool:
            rows = read_metrics(path) if path.is_file() else []
            return not any(row["step"] == step and any(key.startswith(prefix) for key in row) for row in rows)

        # the main rank writes the file: the others may not see its newest row yet
        return on_all_ranks(self.topology, lambda: self.topology.is_main and lacking())[0]

    def make_up_evaluation(self, progress: Progress) -> str | None:
        """Evaluate the weights that a run starts or continues from, where that is due and missing; what stopped it.

        The results get a row of their own in metrics.jsonl: step 0 has no other, that of a later step is written.
        """
        if not self.lacks_evaluation(progress.step):
            return None
        if progress.step > 0:
            self.message(f"evaluating step {progress.step}, which has no result yet")
        results = self.evaluate(progress)
        if results is not None:
            if self.log is not None:
                self.log.write([{"step": progress.step, **results}])
            if progress.step > 0 and self.is_best(results):  # nothing was trained yet that could be kept
                path = self.checkpoints.path_of(progress.step)
                if not on_all_ranks(self.topology, path.is_dir)[0]:  # continued from another folder's
                    self.save(progress, wait=True)
                self.mark_best(path, results)
        return self.stop.agreed(self.topology.host_group, self.topology.world_size)

    def evaluate(self, progress: Progress) -> dict[str, float] | None:
        """Results by their names in the log; None where a signal cut the evaluation short."""
        topology, evaluator = self.topology, self.task.evaluator
        assert evaluator is not None

        def interrupted() -> bool:
            self.stall.at("evaluating", progress.step)
            return self.stop.agreed(topology.host_group, topology.world_size) is not None

        with self.waiting_for(f"evaluating after step {progress.step}"):
            results = evaluate_engine(self.engine, evaluator, interrupted)
        if results is None:
            self.message(f"the evaluation after step {progress.step} was cut short")
        elif self.log is not None and progress.step > 0:
            optimizer, steps = self.run.optimizer, progress.applied_steps
            is_young = optimizer.ema_is_young(steps)
            self.log.warn(describe_lag(evaluator, results, optimizer.ema_initial_share(steps), is_young))
        self.last_end = time.perf_counter()  # the time to evaluate is not the next step's
        return results

    def is_best(self, results: dict[str, float]) -> bool:
        """Whether the results are better than those of the best checkpoint; the same on every rank."""
        best = self.best_of(results)
        if best is None:
            return False
        former = on_all_ranks(self.topology, self.checkpoints.best_value)[0]
        return former is None or best[1] > former

    def best_of(self, results: dict[str, float]) -> tuple[str, float] | None:
        """The result by which the best checkpoint is kept, by its name in the log."""
        assert self.task.evaluator is not None
        return best_of(self.task.evaluator, results, self.run.optimizer.ema_is_young(self.engine.applied_steps))

    def mark_best(self, path: Path, results: dict[str, float]) -> None:
        """Keep a checkpoint as the best one, by its average or its raw weights, whichever is ahead."""
        best = self.best_of(results)
        assert best is not None
        if self.topology.is_main:
            self.checkpoints.mark_best(path, *best)
        self.message(f"best so far: {best[0]} {best[1]:.4f}")

    def write_log(self, progress: Progress, results: dict[str, float]) -> None:
        """Write the rows since the last call, with what was measured at the last step; every rank calls it."""
        rows, flat = self.window.read(self.task.health() if self.topology.is_main else None)
        if self.log is None:
            return
        rows[-1] |= self.task.read_health(flat) | results
        self.log.write(rows)
        for step, replicas in self.window.not_finite.items():
            first_sample = progress.samples - (progress.step - step + 1) * self.run.global_batch_size
            self.log.message(describe_non_finite(step, first_sample, replicas, self.run, self.topology))

    def save(self, progress: Progress, wait: bool) -> Path:
        """Write a checkpoint, or with ``async_save`` begin to unless ``wait``; every rank calls it."""
        self.stall.at("saving the checkpoint", progress.step)
        with self.waiting_for(f"saving the checkpoint of step {progress.step}"):
            try:
                path = self.saver.save(self.engine.train_state, progress, self.engine.zero_stage, self.description)
            except SaveError as error:
                raise TrainingError(str(error)) from error
            self.conclude_save(wait)
        self.last_end = time.perf_counter()  # the time to save is not the next step's
        return path

    def conclude_save(self, wait: bool) -> None:
        """Say that the save under way is done, if it is, and learn how long it took; every rank calls it."""
        try:
            saved = self.saver.wait() if wait else self.saver.finished()
        except SaveError as error:
            raise TrainingError(str(error)) from error
        if saved is None:
            return
        self.save_time.measured(saved.seconds)
        self.stop.save_seconds = self.save_time.seconds
        self.message(f"saved {saved.path}")
        if self.log is not None:
            self.log.warn(self.save_time.warning(self.step_seconds))

    def waiting_for(self, what: str) -> AbstractContextManager[None]:
        """A block that the main rank names where it takes long."""
        return waiting_for(what, self.topology.is_main, self.message)

    def message(self, text: str) -> None:
        """Say something on the main rank."""
        if self.log is not None:
            self.log.message(text)
