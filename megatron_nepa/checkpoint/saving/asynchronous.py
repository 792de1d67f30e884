"""Saving within a step, or beside the steps that follow it (``--async_save``)."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_nepa.checkpoint.format.state import TrainState, collect_state
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, PartialCheckpoint, Progress, SaveError
from megatron_nepa.parallel.topology import Topology


@dataclass(frozen=True)
class Saved:
    """A checkpoint that stands under its name.

    Attributes:
        path: the checkpoint's folder.
        seconds: from the call to its publication.
    """

    path: Path
    seconds: float


class CheckpointSaver:
    """Writes a run's checkpoints, at most one at a time; every rank makes the same calls.

    In the background a step pays for :func:`collect_state` alone, the copy of this rank's share to host memory (16
    bytes a parameter over all ranks, held until it is written). Files, checksums, manifest, rename, ``latest`` and the
    removal of old checkpoints follow in a thread, as :meth:`CheckpointStore.save` does them, so a checkpoint is
    complete or absent in the same sense. The ranks agree over a gloo group of their own, which the training's
    collectives never meet. A failure is raised by the next :meth:`finished` or :meth:`wait`.

    Args:
        store: the folder of checkpoints to write to.
        topology: this rank's place.
        in_background: return from :meth:`save` before the checkpoint is written.
    """

    def __init__(self, store: CheckpointStore, topology: Topology, in_background: bool) -> None:
        self.store = store
        self.topology = topology
        self.in_background = in_background
        self._pending: Future[Saved] | None = None
        if in_background:
            group: Any = dist.new_group(backend="gloo")
            self._own_topology = replace(topology, host_group=group)
            self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, train: TrainState, progress: Progress, zero_stage: int, run: dict[str, Any]) -> Path:
        """Save, or begin to; the arguments are those of :meth:`CheckpointStore.save`. Call :meth:`wait` before.

        Returns:
            The folder where the checkpoint stands, or will.

        Raises:
            SaveError: on every rank, where one could not write; the older checkpoints are as they were.
        """
        assert self._pending is None, "one save at a time"
        start = time.perf_counter()
        if not self.in_background:
            path = self.store.save(train, progress, zero_stage, run)
            self._pending = Future()
            self._pending.set_result(Saved(path, time.perf_counter() - start))
            return path
        partial = PartialCheckpoint(self.store, train, progress, zero_stage, run, self._own_topology)
        with partial.complete_or_absent():
            partial.begin()
        self._pending = self._thread.submit(_write, partial, collect_state(train), start)
        return partial.final

    def finished(self) -> Saved | None:
        """The save that every rank has completed since the last call, or None; a collective while one is under way.

        Raises:
            SaveError: on every rank, where one could not write; the older checkpoints are as they were.
        """
        if self._pending is None or not self._is_done_everywhere(self._pending):
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """The save under way, once it is completed, or None where there is none.

        Raises:
            SaveError: on every rank, where one could not write; the older checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def _is_done_everywhere(self, pending: Future[Saved]) -> bool:
        if not self.in_background:
            return True
        if pending.done() and not isinstance(pending.exception(), SaveError | None):
            pending.result()  # an unforeseen error of this rank alone: the others would wait for it
        done = torch.tensor([int(pending.done())], dtype=torch.int32)
        dist.all_reduce(done, dist.ReduceOp.MIN, group=self.topology.host_group)
        return bool(done)


def _write(partial: PartialCheckpoint, state: dict[str, Any], start: float) -> Saved:
    with partial.complete_or_absent():
        # not torch's own saving in the background, which would copy what collect_state has copied
        partial.write(state)
        partial.finish()
    return Saved(partial.final, time.perf_counter() - start)
