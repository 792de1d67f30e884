"""Faults at exact places of a run, and what a run says; each is called on a rank before the script starts."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from tests.runs import pretrain

# a line of Python executed in one of these folders is a moment at which a process can be killed
PLACES = {
    "save": ("/megatron_nepa/checkpoint/", "/torch/distributed/checkpoint/"),
    "step": ("/megatron_nepa/training/", "/deepspeed/runtime/"),
}
# the same lines as of a save, in the threads that write beside the training
BACKGROUND = "background"
_BACKGROUND_THREADS = ("checkpoint", "AsyncCheckpointExecutor")


def pretrain_counting_lines(arguments: list[str]) -> dict[str, int]:
    """Train, and return how many lines were executed in each of :data:`PLACES` and in the background."""
    counts = _no_lines()
    _trace_lines(counts)
    try:
        assert pretrain(arguments) is None
    finally:
        sys.settrace(None)
    return counts


def pretrain_until_killed(arguments: list[str], place: str, line: int, victim: int) -> str | None:
    """Train, and kill rank ``victim`` (SIGKILL) when it has executed ``line`` lines in ``place``."""
    if int(os.environ["RANK"]) == victim:
        _trace_lines(_no_lines(), place, line)
    return pretrain(arguments)


def _trace_lines(counts: dict[str, int], kill_place: str = "", kill_line: int = 0) -> None:
    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        place = next((name for name, folders in PLACES.items() if _is_in(frame, folders)), None)
        if place == "save" and threading.current_thread().name.startswith(_BACKGROUND_THREADS):
            place = BACKGROUND
        elif threading.current_thread() is not threading.main_thread():
            return None
        if place is None:
            return None

        def count(frame: FrameType, event: str, argument: Any) -> Any:
            counts[place] += event == "line"
            if place == kill_place and counts[place] >= kill_line:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        return count

    sys.settrace(enter)
    threading.settrace(enter)


def _no_lines() -> dict[str, int]:
    return dict.fromkeys((*PLACES, BACKGROUND), 0)


def _is_in(frame: FrameType, folders: tuple[str, ...]) -> bool:
    return any(folder in frame.f_code.co_filename for folder in folders)


def fill_disk_in_save(number: int, victim: int) -> None:
    """From its save number ``number`` on, let rank ``victim`` write no file of more than 1000 bytes."""
    from megatron_nepa.checkpoint.saving.checkpoints_folder import PartialCheckpoint

    real, calls = PartialCheckpoint.begin, [0]

    def begin(self: PartialCheckpoint) -> None:
        calls[0] += 1
        if calls[0] == number and int(os.environ["RANK"]) == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        real(self)

    PartialCheckpoint.begin = begin  # type: ignore[method-assign]


def record_messages(path: Path) -> None:
    """Append what the run says on the console to a file."""
    from megatron_nepa.training.reporting.log import RunLog

    def message(self: RunLog, text: str) -> None:
        with path.open("a") as file:
            file.write(f"{text}\n")

    RunLog.message = message  # type: ignore[method-assign]
