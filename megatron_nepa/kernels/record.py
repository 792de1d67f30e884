"""What the project knows of one fused operation: one record for dispatch, proofs, benchmarks, doctor and dry run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_nepa.config import ModelConfig


class NewTensor(Protocol):
    """Makes an input of a shape; ``dtype`` None is that of the activations."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Case:
    """One kernel launch.

    Attributes:
        operation: name of the fused operation.
        direction: forward or backward.
        call: launches it.
        minimum_bytes: what it must read and write in device memory, each tensor once, without statistics, tables,
            parameters and partial sums.
    """

    operation: str
    direction: str
    call: Callable[[], object]
    minimum_bytes: int


@dataclass(frozen=True)
class Operation:
    """One fused operation.

    Attributes:
        name: name of the operation's field in ``Kernels``.
        reference: its definition in plain torch.
        fused: imports and returns the function that runs its Triton kernels, called like the reference.
        inputs: arguments of both by name, at a model's shapes for a number of samples, from a maker of tensors.
        trained: names of the inputs that receive gradients.
        minimum_bytes: what forward and what backward must move in device memory, for a model, a number of token rows
            and the bytes of an activation; the stream is fp32.
        launches: every launch with bf16 activations, for a model, samples and tokens, from a maker of tensors.
        serves: whether a model has the operation.
        scale: size of the terms of an output that is a sum with cancellation, against which its rounding counts; 0
            where none is.
        on_cpu: serves bf16 on a CPU better than the reference, called like it; None where nothing does.
    """

    name: str
    reference: Callable[..., Any]
    fused: Callable[[], Callable[..., Any]]
    inputs: Callable[[ModelConfig, int, NewTensor], dict[str, Any]]
    trained: tuple[str, ...]
    minimum_bytes: Callable[[ModelConfig, int, int], tuple[int, int]]
    launches: Callable[[ModelConfig, int, int, NewTensor], Iterator[Case]]
    serves: Callable[[ModelConfig], bool] = lambda model: True
    scale: float = 0.0
    on_cpu: Callable[..., Any] | None = None
