"""Memory of the run."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from megatron_nepa.training.reporting.device_memory import memory_gb, reset_peak_memory
from tests.distributed.cases import Case, build_engine, sample_images
from tests.distributed.ranks import run_ranks


def test_cpu_peak_is_the_kernels_high_water_mark() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert memory_gb(torch.device("cpu")) == pytest.approx(kibibytes * 1024 / 1e9, rel=0.05)


def tensors_alive() -> tuple[int, int]:
    """How many tensors live, and how many of them hang on a graph."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return len(tensors), sum(each.grad_fn is not None for each in tensors)


def tensors_after(warmup: int, steps: int, kept: bool) -> list[tuple[int, int]]:
    """Tensors alive after ``warmup`` steps and after ``steps`` more; ``kept`` holds on to every loss."""
    case = Case(global_batch_size=2).on(micro_batch_size=2)
    engine = build_engine(case)
    losses, counts = [], []
    for count in (warmup, steps):
        for step in range(count):
            images = sample_images(range(2), case.model, torch.float32)
            loss = engine.forward(images, torch.arange(2) + 2 * step).loss
            engine.backward(loss)
            engine.step(1e-3)
            if kept:
                losses.append(loss)
        assert all(param.grad is None for param in engine.module.parameters())
        counts.append(tensors_alive())
    return counts


@pytest.mark.slow
def test_a_thousand_steps_leak_no_tensor_and_no_graph() -> None:
    before, after = run_ranks(1, tensors_after, 3, 1000, False)[0]
    assert after == before


def test_a_kept_loss_would_be_seen() -> None:
    before, after = run_ranks(1, tensors_after, 3, 3, True)[0]
    assert after[1] >= before[1] + 3


def test_the_peak_of_start_up_is_forgotten_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    reset_peak_memory(torch.device("cpu"))
    assert calls == []
    reset_peak_memory(torch.device("cuda", 1))
    assert calls == ["empty", "reset cuda:1"]
