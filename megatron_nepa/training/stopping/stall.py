"""When the run stands still, say which rank keeps the others waiting, and where."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_nepa.parallel.topology import Topology

# how often a rank looks whether another one asks where it is, and how long the asking rank waits for the answers
LOOK_SECONDS = 2.0
ANSWER_SECONDS = 3 * LOOK_SECONDS


class StallWatch:
    """Context of a training loop that names the rank which is furthest behind, once a rank has not moved for a while.

    Every rank counts the places it comes through (:meth:`at`); they are the same on all ranks. A thread of each rank
    watches the clock. Where a rank stays at one place for too long, every rank answers through the run's store with
    its place and its stack, and one of them prints those of the rank that is furthest behind: the others wait for it.
    A rank that does not answer is stopped, or holds Python's lock in native code. The run is not ended: it may recover.

    Args:
        topology: this rank's place in the run.
        timeout: seconds at one place that count as a stall; 0 watches nothing.
    """

    def __init__(self, topology: Topology, timeout: float) -> None:
        self.rank, self.world_size = topology.rank, topology.world_size
        self.timeout = timeout
        self._count, self._what, self._since = 0, "at the start", time.monotonic()
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StallWatch:
        if self.timeout > 0:
            # a connection of its own: the main thread may be waiting on the other
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(ANSWER_SECONDS)

    def at(self, what: str, step: int) -> None:
        """Note that this rank has come to a new place, such as "waiting for data" of step 12; costs nothing."""
        self._count, self._what, self._since = self._count + 1, f"{what} of step {step}", time.monotonic()

    def _watch(self) -> None:
        incident, reported = 0, -1
        while not self._over.wait(min(LOOK_SECONDS, self.timeout / 4)):
            key = f"stall/{incident}"
            try:
                stalled = time.monotonic() - self._since > self.timeout and self._count != reported
                if stalled or self._store.check([key]):
                    reporter = int(self._store.compare_set(key, "", str(self.rank)))
                    reported, incident = self._count, incident + 1
                    self._store.set(f"{key}/{self.rank}", json.dumps(self._answer()))
                    if reporter == self.rank:
                        self._report(key)
            except RuntimeError as error:
                if not self._over.is_set():
                    _say(f"rank {self.rank} is {self._what}; the run's store does not answer ({error}).", self._stack())
                return

    def _answer(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._since
        return {"count": self._count, "what": self._what, "seconds": seconds, "stack": self._stack()}

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _report(self, key: str) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(0.1)
        answered = [rank for rank, name in enumerate(keys) if self._store.check([name])]
        answers = {rank: json.loads(self._store.get(keys[rank])) for rank in answered}
        silent = [rank for rank in range(self.world_size) if rank not in answers]
        if silent:
            _say(
                f"{_ranks(silent)} not answering: stopped, or stuck in native code that holds Python's lock; "
                f"rank {self.rank} is {self._what} and has waited {time.monotonic() - self._since:.0f} s.",
                "",
            )
            return
        least = min(answer["count"] for answer in answers.values())
        behind = [rank for rank, answer in answers.items() if answer["count"] == least]
        first = answers[behind[0]]
        who = f"{_ranks(behind)} furthest behind" if len(behind) < self.world_size else "all ranks are at one place"
        _say(f"{who}: {first['what']} for {first['seconds']:.0f} s. Stack of rank {behind[0]}:", first["stack"])


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    shown = ", ".join(map(str, ranks[:16])) + (" and others" if len(ranks) > 16 else "")
    return f"ranks {shown} are"


def _say(text: str, stack: str) -> None:
    print(f"stalled: {text}\n{stack}", file=sys.stderr, end="", flush=True)
