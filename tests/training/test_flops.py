"""FLOPs against torch's counter on the real model, and against published figures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_nepa.config import ModelConfig
from megatron_nepa.hardware import data_sheet
from megatron_nepa.models.flops import forward_flops, train_flops
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.training.reporting.device_peak import device_peak_flops

SMALL = ModelConfig(image_size=32, patch_size=8, hidden_size=48, num_layers=3, num_heads=4, mlp_hidden_size=64)
GELU = dataclasses.replace(
    SMALL, mlp="gelu", mlp_hidden_size=192, bos_token=True, position_embedding="none", qk_norm="affine"
)
BIDIRECTIONAL = dataclasses.replace(SMALL, causal=False)
BATCH = 2


def counted(config: ModelConfig, train: bool) -> dict[str, int]:
    """FLOPs by operation that torch counts on the model, attention as one entry."""
    model = NepaForPretraining(config)
    images = torch.zeros(BATCH, 3, config.image_size, config.image_size)
    # as two batched products: not every release of torch counts its CPU attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(images, torch.arange(BATCH)).loss
        if train:
            loss.backward()
    counts = {"attention": 0, "linear": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        counts["attention" if "bmm" in str(operation) else "linear"] += count
    return counts


@pytest.mark.parametrize("config", [SMALL, GELU, BIDIRECTIONAL])
def test_forward_equals_torch_counter(config: ModelConfig) -> None:
    counts = counted(config, train=False)
    tokens = config.sequence_length
    assert counts["attention"] > 0
    # torch counts every query-key pair, kept or not
    kept = (tokens + 1) / (2 * tokens) if config.causal else 1.0
    assert BATCH * forward_flops(config) == counts["linear"] + counts["attention"] * kept


def test_backward_is_twice_the_forward() -> None:
    """Exactly so for every linear but the patch embedding, whose input needs no gradient."""
    forward, both = counted(SMALL, train=False)["linear"], counted(SMALL, train=True)["linear"]
    patch_embedding = 2 * BATCH * SMALL.num_patches * 3 * SMALL.patch_size**2 * SMALL.hidden_size
    assert both == 3 * forward - patch_embedding
    assert train_flops(SMALL) == 3 * forward_flops(SMALL)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "giga_macs", "giga_flops"), [(768, 12, 12, 22.5, 134.8), (1024, 24, 16, 79.1, 474.0)]
)
def test_published_figures(width: int, layers: int, heads: int, giga_macs: float, giga_flops: float) -> None:
    """Forward multiply-adds and training FLOPs of an image of the release's B and L."""
    config = ModelConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        mlp="gelu",
        mlp_hidden_size=4 * width,
        bos_token=True,
        position_embedding="none",
    )
    assert forward_flops(config) / 2e9 == pytest.approx(giga_macs, rel=0.01)
    assert train_flops(config) / 1e9 == pytest.approx(giga_flops, rel=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B300", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_by_device_name(name: str, expected: float | None) -> None:
    sheet = data_sheet(name)
    assert (sheet and sheet.bf16_peak) == expected


def test_cpu_peak_is_measured() -> None:
    peak = device_peak_flops(torch.device("cpu"), torch.float32)
    assert peak.source == "measured float32 matrix product of 1024 x 1024"
    # an upper bound for what a product of the same kind reaches when timed here, give or take a busy machine
    a = torch.ones(1024, 1024)
    torch.mm(a, a)
    with torch.autograd.profiler.profile() as profile:
        torch.mm(a, a)
    microseconds = sum(event.cpu_time_total for event in profile.key_averages() if event.key == "aten::mm")
    rate = 2 * 1024**3 / microseconds * 1e6
    assert rate / 3 < peak.flops < rate * 10
