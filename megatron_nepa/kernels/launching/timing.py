"""Time of a call on its device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of ``call`` in milliseconds.

    On a GPU the calls are queued back to back between CUDA events, so that the cost of launching from Python hides
    behind the device's work, as it does in training; elsewhere each call is timed on the wall clock.
    """
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return statistics.median(_wall_milliseconds(call) for _ in range(repeats))
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
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
