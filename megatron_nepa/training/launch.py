"""How a training script starts and ends as a process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_nepa.config import ConfigError
from megatron_nepa.training.loop import TrainingError

EXIT_BAD_INPUT = 2
EXIT_TRAINING_FAILED = 3


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Run a script's body: a mistake of the user's ends it with one sentence and status 2, a failed training with 3.

    Every rank sees the same settings, so the first rank of each node speaks for all.
    """
    _share_cores()
    status = 0
    try:
        yield
    except (ConfigError, TrainingError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_TRAINING_FAILED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if status:
        sys.exit(status)


def _share_cores() -> None:
    """On a CPU, divide the cores between the ranks of this node, unless OMP_NUM_THREADS says otherwise."""
    if torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1"))))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
