"""The ceiling of a training step: its linears, attention, elementwise operations and update, each timed alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_nepa.benchmarks.contenders import Contest, contests
from megatron_nepa.benchmarks.kernels import time_operation
from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig, OptimizerConfig
from megatron_nepa.kernels.launching.timing import milliseconds

CPU_REPEATS = 5  # a product of NEPA-B takes a tenth of a second there


def measure_ceiling(
    model: ModelConfig, optimizer: OptimizerConfig, batch: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, float]:
    """Time every part of a step of ``batch`` images on one device.

    Args:
        model: the run's model.
        optimizer: whether there is a weight average and clipping.
        batch: images.
        device: where it is measured.
        dtype: dtype of weights and activations.
        compiled: let the elementwise operations be compiled, as ``--compile`` does.

    Returns:
        Milliseconds by part, forward and backward, of all blocks together; of each operation the fastest
        implementation at hand counts.
    """
    layers, width, hidden = model.num_layers, model.hidden_size, model.mlp_hidden_size
    rows = batch * model.sequence_length
    shapes = {"qkv": (width, 3 * width), "attention out": (width, width), "down": (hidden, width)}
    shapes["up"] = (width, hidden * (2 if model.mlp == "swiglu" else 1))
    parts = {f"{name} linear": layers * _linear(rows, *shape, device, dtype) for name, shape in shapes.items()}
    pixels = IMAGE_CHANNELS * model.patch_size**2
    parts["patch embedding"] = _linear(batch * model.num_patches, pixels, width, device, dtype, input_gradient=False)

    times = {"residual_norm": 2 * layers, "cosine_loss": 1}
    allowed = {"eager", "sdpa", "triton"} | ({"compiled"} if compiled else set())
    for operation in (*contests(model, batch, device, dtype), *_gelu(model, rows, device, dtype)):
        if operation.name != "attention":  # whose every back-end may serve the run
            operation.contenders = {name: each for name, each in operation.contenders.items() if name in allowed}
        found = [row.total_ms for row in time_operation(operation, device, 1.0, _repeats(device)) if row.total_ms]
        parts[operation.name] = times.get(operation.name, layers) * min(found)
    weights = layers * sum(inputs * outputs for inputs, outputs in shapes.values()) + pixels * width
    parts["update"] = _update(weights, optimizer, device)
    return parts


def _repeats(device: torch.device) -> int:
    return 20 if device.type == "cuda" else CPU_REPEATS


def _linear(
    rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, input_gradient: bool = True
) -> float:
    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, weight, bias = new(rows, inputs), new(outputs, inputs).requires_grad_(), new(outputs).requires_grad_()
    leaves = [weight, bias] + ([x.requires_grad_()] if input_gradient else [])
    upstream = new(rows, outputs)
    return _time(lambda: torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), leaves, upstream), device)


def _gelu(model: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> list[Contest]:
    if model.mlp != "gelu":
        return []
    inputs = {"input": torch.randn(rows, model.mlp_hidden_size, device=device, dtype=dtype)}
    return [Contest("gelu", inputs, ["input"], 0, {"eager": torch.nn.functional.gelu})]


def _update(weights: int, config: OptimizerConfig, device: torch.device) -> float:
    """AdamW on flat fp32 masters, the gradient's norm and the weight average."""
    masters = torch.zeros(weights, device=device, requires_grad=True)
    masters.grad = torch.zeros_like(masters)
    average = masters.detach().clone()
    adam = torch.optim.AdamW([masters], lr=1e-4, fused=True)

    def update() -> None:
        assert masters.grad is not None
        if config.clip_grad > 0:
            masters.grad.mul_(1 / masters.grad.norm().clamp(min=1.0))
        adam.step()
        if config.ema_decay > 0:
            average.lerp_(masters.detach(), 1 - config.ema_decay)

    return _time(update, device)


def _time(call: Callable[[], object], device: torch.device) -> float:
    return milliseconds(call, device, repeats=_repeats(device), warmup=1)
