"""Memory that the run uses."""

from __future__ import annotations

import resource

import torch


def memory_gb(device: torch.device) -> float:
    """Peak memory in gigabytes (1e9 bytes).

    On CUDA: of the tensors on ``device``, since ``torch.cuda.reset_peak_memory_stats``. On a CPU: the resident set of
    this process, since it started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts it in KiB


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak of start-up, and give back what its timings held; on a CPU nothing."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
