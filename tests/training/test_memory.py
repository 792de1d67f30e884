"""Memory of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_nepa.training.memory import memory_gb


def test_cpu_peak_is_the_kernels_high_water_mark() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert memory_gb(torch.device("cpu")) == pytest.approx(kibibytes * 1024 / 1e9, rel=0.05)
