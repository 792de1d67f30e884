"""Time of a call on its device.

Ours rather than triton.testing.do_bench, which needs a GPU, or torch.utils.benchmark, which times Python where the
device is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

# for how long at most the device is kept busy while calls are queued, and no GPU's clock is faster than this
MAX_HEAD_START = 2.0
CYCLES_PER_SECOND = 3e9


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of ``call`` in milliseconds.

    On a GPU the calls are queued back to back between CUDA events while the device is kept busy, so that it runs them
    without waiting for Python; elsewhere each call is timed on the wall clock.
    """
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return statistics.median(_wall_milliseconds(call) for _ in range(repeats))
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - start
        torch.cuda._sleep(int(min(2 * repeats * host_seconds, MAX_HEAD_START) * CYCLES_PER_SECOND))
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(marks))


def _wall_milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
