"""The checkpoints that a run writes between its steps, and how long each takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_nepa.checkpoint.format.agreement import RankError, on_all_ranks
from megatron_nepa.checkpoint.saving.asynchronous import CheckpointSaver
from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress, SaveError
from megatron_nepa.config import require
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.reporting.log import Log
from megatron_nepa.training.reporting.run_record import RunRecord
from megatron_nepa.training.step import StepClock
from megatron_nepa.training.stopping.errors import TrainingError
from megatron_nepa.training.stopping.save_time import SaveTime, checkpoint_bytes
from megatron_nepa.training.stopping.stall import StallWatch


class Saves:
    """Writes a run's checkpoints, at most one at a time; every rank makes the same calls.

    Args:
        engine: with what is saved.
        record: the run's folder, where they are written.
        description: what the manifest says of the run.
        in_background: write beside the steps that follow (``--async_save``).
        clock: of the steps, whose time a save is not.
        stall: told where this rank is.
        log: the run's log.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        record: RunRecord,
        description: dict[str, Any],
        in_background: bool,
        clock: StepClock,
        stall: StallWatch,
        log: Log,
    ) -> None:
        self.engine, self.record, self.description = engine, record, description
        self.clock, self.stall, self.log = clock, stall, log
        self.saver = CheckpointSaver(record.checkpoints, engine.topology, in_background)
        num_bytes = checkpoint_bytes(engine.module, engine.topology.tensor.size, has_ema=engine.ema is not None)
        self.time = SaveTime(num_bytes)

    def require_room(self) -> None:
        """Refuse a disk that has no room for one checkpoint, before the first step; every rank calls it.

        Raises:
            ConfigError: on every rank.
        """
        topology, folder = self.engine.topology, self.record.path
        total, _, free = on_all_ranks(topology, lambda: tuple(shutil.disk_usage(folder)) if topology.is_main else ())[0]
        require(
            free >= self.time.num_bytes or total == 0,  # of a file system that tells nothing
            f"a checkpoint of this run takes {self.time.num_bytes / 1e6:,.1f} MB, and the disk of {folder} has "
            f"{free / 1e6:,.1f} MB left: make room, or choose another --output_dir.",
        )

    def save(self, progress: Progress, wait: bool) -> Path:
        """Write a checkpoint, or begin to: where it stands, or will.

        Args:
            progress: where the run stands.
            wait: until it is complete, in the background or not.

        Raises:
            TrainingError: on every rank, where one could not write; the older checkpoints are as they were.
        """
        self.stall.at("saving the checkpoint", progress.step)
        with self.log.waiting_for(f"saving the checkpoint of step {progress.step}"):
            try:
                path = self.saver.save(self.engine.train_state, progress, self.engine.zero_stage, self.description)
            except SaveError as error:
                raise TrainingError(str(error)) from error
            self.conclude(wait)
        self.clock.restart()
        return path

    def restore_folder(self, step: int) -> None:
        """Make the run's folder anew where it was removed, before anything is written there after a step.

        Raises:
            TrainingError: on every rank, where it cannot be.
        """
        folder = self.record.path
        try:
            restored = self.record.restore(self.engine.topology)
        except RankError as error:
            raise TrainingError(
                f"step {step} cannot be saved: {folder} was removed or changed while the run went on, and cannot be "
                f"made anew ({error}): choose another --output_dir."
            ) from error
        if restored:
            self.log.message(f"warning: {folder} was removed while the run went on: made anew at step {step}.")

    def conclude(self, wait: bool) -> None:
        """Say that the save under way is done, if it is, and learn how long it took.

        Args:
            wait: for it.

        Raises:
            TrainingError: on every rank, where one could not write.
        """
        try:
            saved = self.saver.wait() if wait else self.saver.finished()
        except SaveError as error:
            raise TrainingError(str(error)) from error
        if saved is None:
            return
        self.time.measured(saved.seconds)
        self.log.message(f"saved {saved.path}")
        self.log.warn(self.time.warning(self.clock.seconds))
