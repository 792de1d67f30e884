"""What NVIDIA's data sheets promise: dense matrix-product peaks and memory bandwidths, by the device's name."""

from __future__ import annotations

import re
from typing import NamedTuple


class DataSheet(NamedTuple):
    """One line of the table.

    Attributes:
        pattern: of ``torch.cuda.get_device_name``; the first line that matches counts.
        bf16_peak: dense FLOP/s with fp32 accumulation. Most sheets print twice the number, "with sparsity".
        memory_bandwidth: bytes/s of the device's memory.
    """

    pattern: str
    bf16_peak: float
    memory_bandwidth: float


DATA_SHEETS = (
    DataSheet(r"(A100|A800).*PCIE.*80GB", 312e12, 1.935e12),
    DataSheet(r"(A100|A800).*80GB", 312e12, 2.039e12),
    DataSheet(r"A100|A800", 312e12, 1.555e12),
    DataSheet(r"(H100|H800) PCIe", 756e12, 2.0e12),
    DataSheet(r"H100 NVL", 835e12, 3.9e12),
    DataSheet(r"GH200", 989e12, 4.0e12),
    DataSheet(r"H200 NVL", 835e12, 4.8e12),
    DataSheet(r"H200", 989e12, 4.8e12),
    DataSheet(r"H100|H800", 989e12, 3.35e12),
    DataSheet(r"H20\b", 148e12, 4.0e12),
    DataSheet(r"GB[23]00", 2500e12, 8.0e12),
    DataSheet(r"B[23]00", 2250e12, 8.0e12),
    DataSheet(r"L40S", 362e12, 864e9),
    DataSheet(r"L40\b", 181e12, 864e9),
    DataSheet(r"L4\b", 121e12, 300e9),
    DataSheet(r"A40\b", 150e12, 696e9),
    DataSheet(r"A30\b", 165e12, 933e9),
    DataSheet(r"RTX A6000", 155e12, 768e9),
    DataSheet(r"RTX 3090$", 71e12, 936e9),
    DataSheet(r"RTX 4090$", 165e12, 1008e9),
)


def data_sheet(device_name: str) -> DataSheet | None:
    """The line of a CUDA device, by ``torch.cuda.get_device_name``; None where it is not known."""
    if "MIG" in device_name or "Laptop" in device_name:  # a slice of the GPU, or a slower chip of the same name
        return None
    return next((sheet for sheet in DATA_SHEETS if re.search(sheet.pattern, device_name)), None)
