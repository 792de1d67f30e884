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


class LostRankWatch:
    """Context in which a rank that dies takes the others with it within a second, instead of leaving them waiting.

    NCCL notices a dead peer only when a collective times out, after minutes. Here every rank's thread waits for a byte
    from the next rank, over a gloo connection of its own, which the operating system closes when that process ends. The
    byte comes when the next rank leaves the context in order.

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
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LostRankWatch:
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            # a connection of its own, made while rank 0, which keeps the store under most launchers, is alive
            self._store = dist.distributed_c10d._get_default_store().clone()
            dist.barrier(self._group)  # all have entered
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
                dist.send(torch.zeros(1), (self.rank - 1) % self.world_size, group=self._group)
            self._thread.join(LEAVE_SECONDS)
        else:
            self._thread.join(VERDICT_SECONDS)

    def _watch(self) -> None:
        following = (self.rank + 1) % self.world_size
        try:
            dist.recv(torch.zeros(1), following, group=self._group)
        except RuntimeError:
            if self._is_first(following):
                line = (
                    f"error: lost rank {following}: its process ended; its own last lines, or the kernel's log where "
                    "it was killed for memory, say why. The other ranks end too.\n"
                )
                os.write(2, line.encode())
            sys.stdout.flush()
            os._exit(self.status)

    def _is_first(self, lost: int) -> bool:
        # the ranks fall like dominoes: only the first has the cause
        try:
            assert self._store is not None
            return bool(self._store.compare_set("lost_rank", "", str(lost)).decode() == str(lost))
        except RuntimeError:
            return lost == 0  # the store is gone with the rank that kept it
