"""How an operation launches its Triton kernels: one call that runs them or, for the kernel report, records them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)  # the dtypes that every kernel takes

_recorder: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton would compile and over which grid it would run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of its tensor arguments."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, args, constants, num_warps))
        return
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device, which need not be the tensor's
        kernel[grid](*args, num_warps=num_warps, **constants)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside the block nothing runs: every launch is appended to the list that the block receives."""
    global _recorder
    _recorder = []
    try:
        yield _recorder
    finally:
        _recorder = None


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], like: Tensor | None = None
) -> None:
    """Refuse a tensor that a kernel would misread.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        shape: its sizes; None where any size will do.
        dtypes: the dtypes that the kernel takes.
        like: tensor on whose device it must be.

    Raises:
        ValueError: wrong number of dimensions, size, dtype, device, or not contiguous.
    """
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if tensor.dim() != len(shape) or any(
        size is not None and size != got for size, got in zip(shape, tensor.shape, strict=False)
    ):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; the kernel takes {wanted}.")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; the kernel takes {names}.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; the kernel takes a contiguous tensor.")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {like.device}.")
