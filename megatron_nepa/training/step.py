"""One optimizer step: its micro-batches, its update and its row in the log."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import ConfigError, RunConfig
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.reporting.device_memory import memory_gb
from megatron_nepa.training.reporting.metric_window import Row
from megatron_nepa.training.reporting.profiling import StepProfiler
from megatron_nepa.training.stopping.errors import RankTrainingError
from megatron_nepa.training.stopping.stall import StallWatch
from megatron_nepa.training.task import Loader, Task


class StepClock:
    """Seconds of the last step, without what evaluations and saves took before it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last_end = time.perf_counter()

    def restart(self) -> None:
        """Begin the next step now: what came since the last one is none of its time."""
        self._last_end = time.perf_counter()

    def end_step(self) -> float:
        """Seconds of the step that ends now."""
        now = time.perf_counter()
        self.seconds, self._last_end = now - self._last_end, now
        return self.seconds


class StepResult(NamedTuple):
    """What a step leaves.

    Attributes:
        progress: where the run stands after it.
        applied: whether the weights changed; False where a gradient was not finite.
        row: its numbers that the host knows, by their names in the log.
        scalars: those that the device has, fp32 [] or [1], which nobody has waited for.
    """

    progress: Progress
    applied: bool
    row: Row
    scalars: dict[str, Tensor]


class Stepper:
    """Makes optimizer steps.

    Args:
        run: the config.
        task: what is trained.
        engine: with the weights.
        loader: this rank's micro-batches.
        rates: learning rates of the engine's parameter groups.
        peak_flops: of this rank's device, for the MFU.
        clock: takes the time of the steps.
        stall: told where this rank is.
        profiler: marks the parts of a step.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        engine: TrainingEngine,
        loader: Loader,
        rates: LearningRates,
        peak_flops: float,
        clock: StepClock,
        stall: StallWatch,
        profiler: StepProfiler,
    ) -> None:
        self.run, self.task, self.engine, self.loader, self.rates = run, task, engine, loader, rates
        self.clock, self.stall, self.profiler = clock, stall, profiler
        self.peak_flops = peak_flops
        self.flops_per_step = task.flops_per_image * run.global_batch_size / engine.topology.world_size

    def step(self, progress: Progress) -> StepResult:
        """The step after ``progress``; every rank calls it.

        Raises:
            RankTrainingError: on this rank alone, where its data cannot be read.
        """
        number = progress.step + 1
        learning_rates = self.rates.at(progress.step)
        scalars, data_seconds = self._accumulate(number)
        self.stall.at("in the weight update", number)
        with self.profiler.part("optimizer"):
            update = self.engine.step(learning_rates)
        progress = replace(
            progress,
            step=number,
            samples=progress.samples + self.run.global_batch_size,
            applied_steps=self.engine.applied_steps,
            skipped_in_a_row=self.engine.skipped_in_a_row,
        )
        row = self._row(progress, max(learning_rates.values()), self.clock.end_step(), data_seconds)
        return StepResult(progress, update.applied, row, {**scalars, "grad_norm": update.grad_norm})

    def _accumulate(self, number: int) -> tuple[dict[str, Tensor], float]:
        """Gradients of a step's micro-batches; the means of what the task measures, and seconds spent on data."""
        steps = self.engine.accumulation_steps
        scalars: dict[str, Tensor] = {}
        data_seconds = 0.0
        for micro_batch in range(steps):
            self.stall.at("waiting for data", number)
            start = time.perf_counter()
            try:
                with self.profiler.part("data"):
                    batch = next(self.loader)
            except ConfigError as error:  # of this rank's images: the other ranks do not know
                raise RankTrainingError(f"rank {self.engine.topology.rank}: {error}") from error
            data_seconds += time.perf_counter() - start
            self.stall.at("in the forward or backward pass", number)
            with self.profiler.part("forward"):
                loss, values = self.task.forward(self.engine, batch)
            with self.profiler.part("backward"):
                self.engine.backward(loss)
            for name, value in values.items():
                share = value / steps
                scalars[name] = scalars[name] + share if name in scalars else share
            if micro_batch < steps - 1:
                self.engine.end_micro_batch()
        return scalars, data_seconds

    def _row(self, progress: Progress, learning_rate: float, seconds: float, data_seconds: float) -> Row:
        return {
            "step": progress.step,
            **self.task.passes(progress.samples),
            "samples": progress.samples,
            "lr": learning_rate,
            "step_ms": seconds * 1e3,
            "data_wait_ms": data_seconds * 1e3,
            "samples_per_second": self.run.global_batch_size / seconds,
            "tflops_per_device": self.flops_per_step / seconds / 1e12,
            "mfu": self.flops_per_step / seconds / self.peak_flops,
            "memory_gb": memory_gb(self.engine.topology.device),
            "skipped_steps": progress.step - progress.applied_steps,
            "bad_images": self.loader.num_bad_images,
        }
