"""Training steps in one process without an engine: bf16 weights, fp32 masters, torch's fused AdamW, an average.

What ZeRO-2 computes on one rank, where DeepSpeed is not installed; and the release's step beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_nepa.acceptance.device_calls import Cuda
from megatron_nepa.config import ActivationCheckpointing, ModelConfig, ParallelConfig
from megatron_nepa.kernels.dispatch import select_kernels
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.training.engine.compiled_blocks import compile_blocks

LEARNING_RATE, CLIP, EMA_DECAY = 1e-4, 1.0, 0.9999
WARMUP_STEPS = 3


class Steps(Protocol):
    """Something that takes a training step."""

    def step(self, images: Tensor) -> Tensor:
        """One step on images [b, 3, S, S]; its loss."""
        ...


class PlainSteps:
    """This project's model.

    Args:
        calls: to the device.
        model: its shape.
        micro_batch: images of a step.
        compiled: compile the blocks, as ``--compile`` does.
        checkpointing: what is computed again in the backward pass.
    """

    def __init__(
        self,
        calls: Cuda,
        model: ModelConfig,
        micro_batch: int,
        compiled: bool = False,
        checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        shape = (micro_batch, model.sequence_length, model.num_heads, model.head_size)
        kernels = select_kernels("auto", calls.device, attention_shape=shape, causal=model.causal)
        build = Build(ParallelConfig(activation_checkpointing=checkpointing), kernels=kernels)
        self.model = NepaForPretraining(model, build=build).to(calls.device).bfloat16().train()
        if compiled:
            torch._dynamo.reset()  # a second shape would be compiled as one of any size
            compile_blocks(self.model, calls.compile_backend)
        self.parameters: list[Tensor] = [each for each in self.model.parameters() if each.requires_grad]
        self.masters = [each.detach().float().requires_grad_() for each in self.parameters]
        self.average = [each.detach().clone() for each in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)
        self.sample_index = torch.arange(micro_batch, device=calls.device)

    def step(self, images: Tensor) -> Tensor:
        """Forward, backward, clipping, AdamW and the average."""
        loss: Tensor = self.model(images, self.sample_index).loss
        loss.backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [each.detach() for each in self.masters], 1 - EMA_DECAY)
            torch._foreach_copy_(self.parameters, self.masters)
        return loss.detach()


class PeerSteps:
    """The release's model in transformers, as its trainer takes a step: fp32 weights under bf16 autocast.

    Args:
        calls: to the device.
        model: its shape, of a release recipe.
        compiled: compile its blocks, as this project's are.
    """

    def __init__(self, calls: Cuda, model: ModelConfig, compiled: bool = False) -> None:
        from megatron_nepa.benchmarks.train.peer_model import PeerModel

        torch.manual_seed(0)
        self.model: Any = PeerModel(model).to(calls.device).train()
        self.device_type = calls.device.type
        self.weights = [each for each in self.model.parameters() if each.requires_grad]
        self.average = [each.detach().clone() for each in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LEARNING_RATE, fused=True)
        if compiled:
            torch._dynamo.reset()
            for module in self.model.modules():
                if type(module).__name__ == "DINOv3ViTLayer":  # one block is compiled for all, as this project's is
                    module.compile(backend=calls.compile_backend)

    def step(self, images: Tensor) -> Tensor:
        """The same duties."""
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            loss: Tensor = self.model(images.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [each.detach() for each in self.weights], 1 - EMA_DECAY)
        return loss.detach()


@dataclass(frozen=True)
class Timing:
    """Of some steps.

    Attributes:
        micro_batch: images of each.
        seconds: of one.
        peak_gb: of memory, the model included.
        waited: seconds of a step that the host waited for its images.
        losses: of all steps.
    """

    micro_batch: int
    seconds: float
    peak_gb: float
    waited: float
    losses: list[float]

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.micro_batch / self.seconds


def time_steps(
    calls: Cuda, build: Callable[[], Steps], micro_batch: int, images: Iterator[Tensor], steps: int
) -> Timing:
    """Build, warm up and time."""
    calls.start_peak()
    stepper, losses, waited = build(), [], 0.0
    for number in range(WARMUP_STEPS + steps):
        if number == WARMUP_STEPS:
            calls.synchronize()
            waited, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch = next(images)
        waited += time.perf_counter() - before
        losses.append(stepper.step(batch))
    calls.synchronize()
    seconds = (time.perf_counter() - start) / steps
    return Timing(micro_batch, seconds, calls.peak_gb(), waited / steps, [float(loss) for loss in losses])


def random_images(calls: Cuda, size: int, micro_batch: int) -> Iterator[Tensor]:
    """The same images again and again, bf16 [micro_batch, 3, size, size]: no decoding, no copy."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(micro_batch, 3, size, size, generator=generator).mul_(2).sub_(1).bfloat16().to(calls.device)
    while True:
        yield images
