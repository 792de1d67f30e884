"""Worker processes that never outlive the process that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

# spawn: a fork of a process that holds torch's and DALI's threads can hang
SPAWN = multiprocessing.get_context("spawn")


def worker_pool(workers: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool of fresh processes, each of which first calls ``initializer(*arguments)``."""
    return ProcessPoolExecutor(
        workers, mp_context=SPAWN, initializer=_start_worker, initargs=(os.getpid(), initializer, arguments)
    )


def _start_worker(parent: int, initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Linux kills this process when its parent dies, however that dies (PR_SET_PDEATHSIG)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it died while this process was starting
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if initializer is not None:
        initializer(*arguments)
