"""Start ranks for a test: forked from one warm server, so that imports are paid once for the whole suite."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])
TIMEOUT_SECONDS = 300
# with torch 2.14 malloc was seen to abort in a reduce-scatter over gloo, one start in hundreds, for an unknown cause
DAMAGED_HEAP = {-signal.SIGABRT, -signal.SIGSEGV}


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(*arguments)`` on ``world_size`` fresh gloo ranks; returns what each rank returned.

    Ranks of which one was aborted or met a segmentation fault are started a second time, with a warning.

    Raises:
        AssertionError: with the traceback of every rank that failed.
    """
    statuses, outcomes = _outcomes(world_size, function, arguments)
    if not DAMAGED_HEAP.isdisjoint(statuses):
        warnings.warn(f"ranks crashed, exit statuses {statuses}: they are started once more", stacklevel=2)
        statuses, outcomes = _outcomes(world_size, function, arguments)
    alive = [rank for rank, status in enumerate(statuses) if status is None]
    errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(outcomes) if error]
    if errors or alive:
        raise AssertionError(f"ranks still running: {alive}\n" + "\n".join(errors))
    return [value for value, _ in outcomes]


def _outcomes(
    world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[list[int | None], list[tuple[Any, str | None]]]:
    with tempfile.TemporaryDirectory() as folder:
        statuses = _run(world_size, folder, function, arguments)
        return statuses, [_read(Path(folder) / f"{rank}.pickle", status) for rank, status in enumerate(statuses)]


def exit_statuses(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Call a function that ends its process on fresh gloo ranks; the exit status of each, None of one that hung."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(world_size, folder, function, arguments)


def _run(world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[int | None]:
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, world_size, folder, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return statuses


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    torch.set_num_threads(1)
    faulthandler.enable()  # a rank that a signal ends says where, and one that hangs
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 10)
    outcome: tuple[Any, str | None]
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        outcome = (function(*arguments), None)
        dist.barrier()
    except BaseException:
        outcome = (None, traceback.format_exc())
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder) / f"{rank}.pickle")
    sys.stdout.flush()
    os._exit(0)  # the other ranks may be gone: there is nothing left to shut down together


def _read(path: Path, status: int | None) -> tuple[Any, str | None]:
    if not path.exists():
        return None, f"it ended without a result, with exit status {status} (a signal's number where it is below 0)"
    return pickle.loads(path.read_bytes())  # type: ignore[no-any-return]
