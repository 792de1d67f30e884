"""Functions called on several ranks of this machine, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 300


def on_ranks(world_size: int, device_type: str, function: Callable[..., Any]) -> list[Any]:
    """Call ``function(device)``, a module's own, on ``world_size`` joined ranks; what each returned.

    Raises:
        RuntimeError: with the message of a rank that failed, or naming those that did not answer.
    """
    # forked from one process that has imported everything
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_nepa.doctor.parallel"])
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world_size, device_type, folder, function, answers), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < world_size:
                rank, value, error = answers.get(timeout=TIMEOUT_SECONDS)
                if error is not None:
                    raise RuntimeError(f"rank {rank}: {error}")
                found[rank] = value
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(found))
            raise RuntimeError(f"no answer from ranks {missing} in {TIMEOUT_SECONDS} s") from None
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [found[rank] for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, device_type: str, folder: str, function: Callable[..., Any], answers: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    answer: tuple[int, Any, str | None]
    warnings.simplefilter("ignore", FutureWarning)  # torch announces new names of its collectives
    try:
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        answer = (rank, function(device), None)
        dist.barrier()
    except Exception:
        answer = (rank, None, traceback.format_exc().strip().splitlines()[-1])
    answers.put(answer)
    answers.close()
    answers.join_thread()
    os._exit(0)  # the other ranks may be gone: there is nothing left to shut down together
