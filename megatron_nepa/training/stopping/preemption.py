"""Stopping on a signal or before the job's time is over: finish the step, save, exit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_nepa.training.stopping.signals import heard_signals

# one stop reaches a rank several times: from the terminal or Slurm, and from the launcher, which passes it on
REPEAT_SECONDS = 3.0
# kept free at the end of a job's time for the step in progress and the exit; the time to save comes on top
EXIT_SECONDS = 60.0
_END_OF_TIME = 1000  # among the signals' numbers, above all of them


def job_end_time() -> float | None:
    """When the Slurm job that this process runs in will be ended (seconds of the epoch), or None."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


class StopSignal:
    """Context in which a signal or the nearing end of the job's time asks the run to stop.

    The signals are SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone, as it is after Ctrl-C where the
    launcher that ends at once was all that ran there).

    The first signal only sets a flag; the same one again more than 3 seconds later ends the process at once, with exit
    status 128 plus the signal's number. Another one (Slurm sends SIGTERM after SIGUSR1) lets the save finish. The
    former handlers return when the context ends. Enter it in the main thread.

    Args:
        announce: print a line at the first signal; give it to one rank.
        end_time: when the job will be ended, in seconds of the epoch; None for never.
        save_seconds: how long a save is expected to take; may be set anew at any time.
    """

    def __init__(self, announce: bool = True, end_time: float | None = None, save_seconds: float = 0.0) -> None:
        self.announce = announce
        self.end_time = end_time
        self.save_seconds = save_seconds
        self._number = 0
        self._time = 0.0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._former = {number: signal.signal(number, self._handle) for number in heard_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come to this rank."""
        return self._number != 0

    def agreed(self, host_group: dist.ProcessGroup | None, world_size: int) -> str | None:
        """Why some rank has to stop ("SIGTERM", "the end of the job's time"), the same on every rank, or None.

        A collective call where ``world_size`` exceeds 1: an all-reduce of one integer on the host.

        Args:
            host_group: gloo group of all ranks; None will do for one rank.
            world_size: number of ranks.
        """
        number = self._number
        # twice the expected time to save: the file system is shared
        leave_by = None if self.end_time is None else self.end_time - EXIT_SECONDS - 2 * self.save_seconds
        if not number and leave_by is not None and time.time() >= leave_by:
            number = _END_OF_TIME
        if world_size > 1:
            flag = torch.tensor([number], dtype=torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=host_group)
            number = int(flag)
        if number == _END_OF_TIME:
            return "the end of the job's time"
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number:
            if number == self._number and now - self._time > REPEAT_SECONDS:
                os._exit(128 + number)
            return
        self._number, self._time = number, now
        if self.announce:
            name, seconds = signal.Signals(number).name, f"{REPEAT_SECONDS:.0f} s"
            line = f"\n{name}: stopping after this step; the same signal more than {seconds} later exits at once.\n"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, line.encode())  # print may be what the signal interrupted, and is not re-entrant
