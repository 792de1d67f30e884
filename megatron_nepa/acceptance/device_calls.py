"""Every call to CUDA that the acceptance makes itself, and the small stand-in for them that a CPU rehearses with.

What the package calls (kernels, engine, decoder) is not here: on a CPU it takes its own ways of a CPU.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megatron_nepa.training.reporting.device_memory import memory_gb, reset_peak_memory


class Cuda:
    """The real ones, on the first device.

    Attributes:
        is_gpu: whether checks that need a GPU run.
        device: of the model.
        activities: of the profiler.
        compile_backend: of ``torch.compile``.
    """

    is_gpu = True
    compile_backend = "inductor"
    activities: tuple[ProfilerActivity, ...] = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)

    def count(self) -> int:
        """Devices."""
        return torch.cuda.device_count()

    def devices(self) -> list[torch.device]:
        """All of them."""
        return [torch.device("cuda", number) for number in range(self.count())]

    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name(self.device)

    def memory_bytes(self) -> float:
        """Of the device."""
        return float(torch.cuda.get_device_properties(self.device).total_memory)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def start_peak(self) -> None:
        """Forget the peak of memory so far."""
        reset_peak_memory(self.device)

    def peak_gb(self) -> float:
        """Peak of memory in 1e9 bytes since then."""
        return memory_gb(self.device)

    def device_microseconds(self, event: Any) -> float:
        """What a profiled operation kept the device busy by itself."""
        return float(event.self_device_time_total)

    def sanitizer(self) -> list[str] | None:
        """The command that runs another under memcheck, or None where it is not installed."""
        path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        return None if path is None else [path, "--tool", "memcheck", "--error-exitcode", "9"]


class Cpu(Cuda):
    """What a CPU has in their place; checks that need a GPU do not run."""

    is_gpu = False
    activities: tuple[ProfilerActivity, ...] = (ProfilerActivity.CPU,)

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def count(self) -> int:
        """None."""
        return 0

    def devices(self) -> list[torch.device]:
        """The CPU."""
        return [self.device]

    def name(self) -> str:
        """Not that of a GPU."""
        return "CPU"

    def memory_bytes(self) -> float:
        """Enough for toy sizes."""
        return 4e9

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def device_microseconds(self, event: Any) -> float:
        """What the operation took the CPU by itself."""
        return float(event.self_cpu_time_total)

    def sanitizer(self) -> list[str] | None:
        """There is none."""
        return None


class StandIn(Cpu):
    """Two GPUs that are this CPU: everything runs, at toy sizes."""

    is_gpu = True
    compile_backend = "eager"

    def count(self) -> int:
        """As many as a grid needs."""
        return 2

    def sanitizer(self) -> list[str] | None:
        """Nothing around the command."""
        return []


def device_calls(rehearsal: bool) -> Cuda:
    """Those of this machine."""
    if torch.cuda.is_available():
        return Cuda()
    return StandIn() if rehearsal else Cpu()
