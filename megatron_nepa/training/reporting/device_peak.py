"""Floating-point operations of the device at its best, the denominator of MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_nepa.hardware import data_sheet

if TYPE_CHECKING:
    import torch

_MEASURED_SECONDS = 0.3  # of a matrix product


@dataclass(frozen=True)
class DevicePeak:
    """Largest matrix-product rate of one device.

    Attributes:
        flops: FLOP/s.
        source: where the number comes from, for the log.
    """

    flops: float
    source: str


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """Peak of ``device`` in ``dtype``, the denominator of MFU.

    A known GPU in bf16 has its data sheet's dense peak. All else (a CPU, an unknown GPU or a slice of one, another
    dtype) has the rate of a large matrix product, measured in about 0.3 s with the threads that this process has.
    """
    import torch  # here, since a plan counts operations without it

    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        sheet = data_sheet(name)
        if sheet is not None:
            return DevicePeak(sheet.bf16_peak, f"dense bf16 peak of {name}")
    size = 1024 if device.type == "cpu" else 4096
    kind = str(dtype).removeprefix("torch.")
    return DevicePeak(measure_matmul(device, dtype, size), f"measured {kind} matrix product of {size} x {size}")


def measure_matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the fastest of several products of two ``size`` x ``size`` matrices."""
    import torch

    a, b = (
        torch.randn(size, size, device=device).to(dtype) for _ in range(2)
    )  # on ones a GPU draws less, and clocks higher
    out = torch.empty_like(a)
    times: list[float] = []
    while len(times) < 4 or sum(times) < _MEASURED_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])  # the first call also sets the library up
