"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_nepa import __version__

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """A device, the versions that ran on it, and the day."""

    device: str
    threads: int
    torch_version: str
    project_version: str
    date: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This machine, today."""
        import torch

        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            project_version=__version__,
            date=datetime.date.today().isoformat(),
        )


def cpu_name() -> str:
    """The processor's name, as Linux gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
