"""Floating-point operations of the model, and of the device at its best: throughput in TFLOP/s and MFU.

Model FLOPs follow PaLM (Chowdhery et al., 2022, appendix B): matrix products only, 2 per multiply-add, and a training
step costs three forward passes. Full activation checkpointing repeats the blocks' forward pass, which takes time but
adds no model FLOPs: it lowers the MFU, as it should. Selective activation checkpointing repeats no matrix product.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig
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


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of the forward pass of one image; causal attention counts the query-key pairs that it keeps."""
    tokens, width = config.sequence_length, config.hidden_size
    pixels = IMAGE_CHANNELS * config.patch_size**2
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    pairs = tokens * (tokens + 1) // 2 if config.causal else tokens**2

    patch_embedding = config.num_patches * pixels * width
    linears = tokens * width * (4 * width + mlp_matrices * config.mlp_hidden_size)  # qkv, out, feed-forward
    attention = 2 * pairs * width  # scores, and the mix of values
    return 2 * (patch_embedding + config.num_layers * (linears + attention))


def train_flops(config: ModelConfig) -> int:
    """Model FLOPs of one image's share of a training step: forward and backward, three times the forward pass."""
    return 3 * forward_flops(config)


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
