"""What the planner knows about GPUs and the links between them; every number has its source beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_nepa.hardware import DataSheet, data_sheet

GPUS_PER_NODE = 8
# NCCL keeps 370 of NVLink's 450 GB/s: "protocol overhead (~20 %)" (NVIDIA's maintainer, nccl-tests issue 212)
NVLINK_EFFICIENCY = 370 / 450
# and 46 to 48 of 50 GB/s of a 400 Gb/s InfiniBand adapter (nccl-tests issue 290)
NETWORK_EFFICIENCY = 47 / 50
# seconds of a ring with the Simple protocol: to start it, and a hop (NCCL's own model, src/graph/tuning.cc)
COLLECTIVE_START = 8.4e-6
NVLINK_HOP = 3.4e-6
NETWORK_HOP = 14.0e-6


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight with an InfiniBand adapter each, on a network that does not block.

    Attributes:
        name: the GPU's name as its data sheet prints it.
        memory_bytes: what a run may fill. A part sold as "80 GB" has about 85e9 bytes, one of "141 GB" about 151e9: the
            rest is left to CUDA's context, NCCL's buffers and the allocator's gaps.
        peak_flops: dense bf16 peak in FLOP/s, the denominator of MFU.
        matmul_flops: bf16 FLOP/s of the best matrix product that was measured on the part.
        attention_flops: FlashAttention-2, forward and backward, causal pairs counted once.
        memory_bandwidth: bytes/s, of the data sheet.
        nvlink_bandwidth: bytes/s in each direction, of the data sheet.
        network_bandwidth: bytes/s in each direction of the GPU's own adapter.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    matmul_flops: float
    attention_flops: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float


def _sheet(name: str) -> DataSheet:
    sheet = data_sheet(name)
    assert sheet is not None
    return sheet


H100, H200, A100 = _sheet("NVIDIA H100 80GB HBM3"), _sheet("NVIDIA H200"), _sheet("NVIDIA A100-SXM4-80GB")
_H100 = Gpu(
    "H100 SXM 80 GB",
    memory_bytes=80e9,
    peak_flops=H100.bf16_peak,
    matmul_flops=792.1e12,  # "maximum achievable matmul FLOPS", S. Bekman, ML Engineering (CUDA 12.1)
    attention_flops=141e12,  # head width 64, 512 tokens: the shortest of flash-attention's own charts
    memory_bandwidth=H100.memory_bandwidth,
    nvlink_bandwidth=450e9,
    network_bandwidth=50e9,
)
GPUS = {
    "h100": _H100,
    # the H100's chip, and so its matrix products (the same table says so), with another memory
    "h200": replace(
        _H100,
        name="H200 SXM 141 GB",
        memory_bytes=141e9,
        peak_flops=H200.bf16_peak,
        memory_bandwidth=H200.memory_bandwidth,
    ),
    "a100": Gpu(
        "A100 SXM 80 GB",
        memory_bytes=80e9,
        peak_flops=A100.bf16_peak,
        matmul_flops=267.9e12,  # same table
        attention_flops=88e12,  # same charts
        memory_bandwidth=A100.memory_bandwidth,
        nvlink_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
}


@dataclass(frozen=True)
class Ring:
    """A group of ranks as NCCL joins them: a ring, and for all-reduces between nodes also a tree.

    Attributes:
        size: ranks of the group.
        link: the slowest that the ring crosses.
        bandwidth: bytes/s that each rank sends. Between nodes it is what the adapters of the group's ranks in one node
            carry together, at most NVLink's: NCCL opens a ring for each adapter.
        turn: seconds of latency of one turn of the ring.
        all_reduce: seconds of latency of an all-reduce: two turns, or up and down the tree where that is less.
    """

    size: int
    link: Literal["NVLink", "InfiniBand"]
    bandwidth: float
    turn: float
    all_reduce: float


def ring_of(gpu: Gpu, size: int, ranks_per_node: int) -> Ring:
    """The ring of a group of ``size`` ranks, up to ``ranks_per_node`` of them in a node."""
    nvlink = gpu.nvlink_bandwidth * NVLINK_EFFICIENCY
    nodes = -(-size // ranks_per_node)
    if nodes == 1:
        turn = (size - 1) * NVLINK_HOP
        return Ring(size, "NVLink", nvlink, turn, 2 * turn)
    network = gpu.network_bandwidth * NETWORK_EFFICIENCY * ranks_per_node
    turn = (size - nodes) * NVLINK_HOP + nodes * NETWORK_HOP
    branch = (min(size, ranks_per_node) - 1) * NVLINK_HOP + math.ceil(math.log2(nodes)) * NETWORK_HOP
    return Ring(size, "InfiniBand", min(nvlink, network), turn, 2 * min(turn, branch))
