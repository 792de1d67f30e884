"""LARS takes the steps that MAE's does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_nepa.training.engine.lars import build_lars

LR, MOMENTUM = 0.3, 0.9


def step_by_hand(values: list[Tensor], gradients: list[Tensor], velocity: list[Tensor]) -> None:
    """MAE's rule for a probe without weight decay."""
    for value, gradient, speed in zip(values, gradients, velocity, strict=True):
        change = gradient.clone()
        if value.ndim > 1 and value.norm() > 0 and gradient.norm() > 0:
            change *= 0.001 * value.norm() / gradient.norm()
        speed.mul_(MOMENTUM).add_(change)
        value.sub_(LR * speed)


@pytest.mark.parametrize("zero_weight", [False, True])
def test_the_steps_of_mae(zero_weight: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = [draw(5, 7) * (not zero_weight), draw(5), draw(7)]
    parameters = [nn.Parameter(value.clone()) for value in start]
    optimizer = build_lars([{"params": parameters[:1]}, {"params": parameters[1:]}], MOMENTUM)
    for group in optimizer.param_groups:
        group["lr"] = LR
    values, velocity = [value.clone() for value in start], [torch.zeros_like(value) for value in start]
    for step in range(5):
        gradients = [draw(*value.shape) * 10.0 ** (3 - step) for value in start]
        gradients[0] *= step != 2  # a gradient of zeros keeps the momentum going
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        step_by_hand(values, gradients, velocity)
        for parameter, value in zip(parameters, values, strict=True):
            torch.testing.assert_close(parameter.detach(), value, atol=1e-12, rtol=1e-10)
    assert all((value - first).norm() > 0 for value, first in zip(values, start, strict=True))
