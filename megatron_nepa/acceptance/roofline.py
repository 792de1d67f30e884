"""What the planner promises of this device, which a measured speed is judged by."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_nepa.acceptance.device_calls import Cuda
from megatron_nepa.benchmarks.kernels import copy_bandwidth
from megatron_nepa.config import PretrainingConfig
from megatron_nepa.hardware import data_sheet
from megatron_nepa.planning.cluster import A100, GPUS, H100, H200, Gpu
from megatron_nepa.planning.layout import Layout
from megatron_nepa.planning.plan import Plan, predict
from megatron_nepa.training.reporting.device_peak import measure_matmul


def planned(calls: Cuda, run: PretrainingConfig, micro_batch: int) -> Plan:
    """The planner's step of one micro-batch on this device."""
    run = replace(run, global_batch_size=micro_batch)
    return predict(run, Layout(1, micro_batch_size=micro_batch), this_gpu(calls))


def this_gpu(calls: Cuda) -> Gpu:
    """The planner's own record of the device, or one of its data sheet and of rates measured now."""
    sheet = data_sheet(calls.name())
    for known, key in ((H100, "h100"), (H200, "h200"), (A100, "a100")):
        if sheet == known:
            return GPUS[key]
    rate = measure_matmul(calls.device, torch.bfloat16, 8192 if calls.device.type == "cuda" else 512)
    model = GPUS["h100"]
    return replace(
        model,
        name=calls.name(),
        memory_bytes=0.94 * calls.memory_bytes(),
        peak_flops=sheet.bf16_peak if sheet else rate,
        matmul_flops=rate,
        attention_flops=rate * model.attention_flops / model.matmul_flops,
        memory_bandwidth=sheet.memory_bandwidth if sheet else copy_bandwidth(calls.device),
    )
