"""When one rank dies, the others end at once and say which it was."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_nepa.parallel.topology import Topology

# a rank whose own collective failed leaves its watch this long to find out that a peer is the cause
VERDICT_SECONDS = 2.0
# ranks leave together, after the same step; a thread that still waits would break the interpreter's shutdown
LEAVE_SECONDS = 60.0
# what a rank hears from the next one
_IN_ORDER, _LOST = 0, 1


class LostRankWatch:
    """Context in which a rank that dies takes the others with it within a second, instead of leaving them waiting.

    NCCL notices a dead peer only when a collective times out, after minutes. Here every rank's thread waits for a word
    from the next rank, over a gloo connection of its own, which the operating system closes when that process ends. The
    word comes when the next rank leaves the context in order, or has itself lost one.

    Args:
        topology: this rank's place; a run of one rank has nobody to lose.
        status: exit status of the ranks that end.
        orderly: exceptions that every rank raises together, so that leaving with one is in order.
    """

    def __init__(self, topology: Topology, status: int, orderly: tuple[type[BaseException], ...] = ()) -> None:
        self.rank, self.world_size = topology.rank, topology.world_size
        self.status = status
        self.orderly = orderly
        self._group: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LostRankWatch:
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            dist.barrier(self._group)  # connects
            self._thread = threading.Thread(target=self._watch, name="lost-rank-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if kind is None or issubclass(kind, self.orderly):
            with contextlib.suppress(RuntimeError):  # it may be gone already
                dist.send(torch.full((1,), _IN_ORDER), (self.rank - 1) % self.world_size, group=self._group)
            self._thread.join(LEAVE_SECONDS)
        else:
            self._thread.join(VERDICT_SECONDS)

    def _watch(self) -> None:
        following, preceding = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        word = torch.full((1,), _IN_ORDER)
        try:
            dist.recv(word, following, group=self._group)
        except RuntimeError:
            word.fill_(_LOST)
            line = (
                f"error: lost rank {following}: its process ended; its own last lines, or the kernel's log where "
                "it was killed for memory, say why. The other ranks end too.\n"
            )
            os.write(2, line.encode())
        if int(word) == _LOST:
            # passed on, so that only the rank that saw it tells it
            with contextlib.suppress(RuntimeError):
                dist.send(word, preceding, group=self._group)
            sys.stdout.flush()
            os._exit(self.status)
