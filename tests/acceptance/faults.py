"""Faults that are planted into a part's process: each breaks one thing, and the acceptance must name it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch


def kernel_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """SwiGLU's kernel writes each value one place too far."""
    from megatron_nepa.acceptance.parts import kernels
    from megatron_nepa.kernels.swiglu.fused import swiglu_triton

    def shifted(gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu_triton(gate_up).roll(1, -1)

    broken = [
        dataclasses.replace(each, fused=lambda: shifted) if each.name == "swiglu" else each
        for each in kernels.OPERATIONS
    ]
    patch.setattr(kernels, "OPERATIONS", tuple(broken))


def decoder_that_shifts(patch: pytest.MonkeyPatch) -> None:
    """The first of two decoders, the GPU's, moves the picture by three pixels."""
    from megatron_nepa.doctor import decoding

    real, calls = decoding.crops, [0]

    def shifting(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return real(*arguments).roll(3, -1) if calls[0] % 2 else real(*arguments)

    patch.setattr(decoding, "crops", shifting)


def decoder_that_looks_at_the_batch(patch: pytest.MonkeyPatch) -> None:
    """A picture that is decoded alone is one grey level brighter."""
    from megatron_nepa.acceptance.parts import decoding

    real = decoding.decode

    def brighter(setting: Any, files: list[Any], load: float) -> torch.Tensor:
        return real(setting, files, load) + (len(files) == 1)

    patch.setattr(decoding, "decode", brighter)


def slow_kernel(patch: pytest.MonkeyPatch) -> None:
    """Every timed kernel waits."""
    from megatron_nepa.benchmarks import kernels

    real = kernels._time

    def slow(*arguments: Any) -> tuple[float, float]:
        forward, total = real(*arguments)
        return forward * 1e6, total * 1e6

    patch.setattr(kernels, "_time", slow)


def slow_steps(patch: pytest.MonkeyPatch) -> None:
    """Every step waits."""
    from megatron_nepa.acceptance import roofline
    from megatron_nepa.acceptance.steps import PlainSteps

    real = PlainSteps.step

    def slow(self: PlainSteps, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return real(self, images)

    patch.setattr(PlainSteps, "step", slow)
    patch.setattr(roofline, "measure_matmul", lambda *arguments: 1e15)  # a device of which much is expected
    patch.setattr(roofline, "copy_bandwidth", lambda *arguments: 1e15)


# in the training script: images differ a little once there is a checkpoint to resume from
RESUME_THAT_DIFFERS = """
import dataclasses, sys
from pathlib import Path
from megatron_nepa.tasks.pretraining import PretrainingTask
folder = next(each for each in sys.argv if each.startswith("--output_dir=")).partition("=")[2]
if any(Path(folder).glob("checkpoints/step_*")):
    real_forward = PretrainingTask.forward
    def other(self, engine, batch):
        return real_forward(self, engine, dataclasses.replace(batch, images=batch.images * 1.001))
    PretrainingTask.forward = other
"""


def resume_that_differs(patch: pytest.MonkeyPatch) -> None:
    """A resumed run sees other images."""
    from megatron_nepa.acceptance.parts import training

    patch.setattr(training, "DETERMINISTIC", f"{training.DETERMINISTIC}\n{RESUME_THAT_DIFFERS}")
