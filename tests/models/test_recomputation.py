"""Activation checkpointing: what is computed twice, and what is kept."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from megatron_nepa.config import ActivationCheckpointing, ParallelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.recomputation import recomputed
from megatron_nepa.objectives.nepa import NepaForPretraining
from tests.distributed.cases import MODEL, sample_images


def counted_flops(level: ActivationCheckpointing) -> int:
    parallel = ParallelConfig(activation_checkpointing=level)
    model = NepaForPretraining(MODEL, build=Build(parallel))
    images = sample_images(range(2), MODEL, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(images, torch.arange(2)).loss.backward()
    flops: int = counter.get_total_flops()
    return flops


def test_selective_repeats_no_matrix_product() -> None:
    none, selective, full = counted_flops("none"), counted_flops("selective"), counted_flops("full")
    assert 0 < none == selective < full


def test_only_arguments_are_kept() -> None:
    x = torch.randn(4, requires_grad=True)
    kept = []

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp()

    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = recomputed(function, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.cos() * x.sin().exp())
    # torch 2.8 keeps an empty tensor besides
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in kept if tensor.numel())
