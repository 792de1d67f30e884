"""Stopping on a signal: finish the step, save, exit."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# one stop reaches a rank several times: from the terminal or Slurm, and from the launcher, which passes it on
REPEAT_SECONDS = 3.0


class StopSignal:
    """Context in which SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask the run to stop instead of killing it.

    The first signal only sets a flag; one that comes more than 3 seconds later ends the process at once, with exit
    status 128 plus the signal's number. The former handlers return when the context ends. Enter it in the main thread.

    Args:
        announce: print a line at the first signal; give it to one rank.
    """

    def __init__(self, announce: bool = True) -> None:
        self.announce = announce
        self._number = 0
        self._time = 0.0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self, host_group: dist.ProcessGroup | None, world_size: int) -> str | None:
        """Name of the signal that some rank received ("SIGTERM"), the same on every rank, or None.

        A collective call where ``world_size`` exceeds 1: an all-reduce of one integer on the host.

        Args:
            host_group: gloo group of all ranks; None will do for one rank.
            world_size: number of ranks.
        """
        number = self._number
        if world_size > 1:
            flag = torch.tensor([number], dtype=torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=host_group)
            number = int(flag)
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number:
            if now - self._time > REPEAT_SECONDS:
                os._exit(128 + number)
            return
        self._number, self._time = number, now
        if self.announce:
            name, seconds = signal.Signals(number).name, f"{REPEAT_SECONDS:.0f} s"
            line = f"\n{name}: stopping after this step; a signal more than {seconds} later exits at once.\n"
            os.write(2, line.encode())  # print may be what the signal interrupted, and is not re-entrant
