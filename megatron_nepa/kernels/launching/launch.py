"""How an operation launches its Triton kernels: one call, which the kernel report intercepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)  # the dtypes that every kernel takes

_interceptor: Callable[[Launch], None] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton would compile and over which grid it would run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int

    def run(self) -> None:
        """Run the kernel on the device of its tensor arguments."""
        tensor = next(arg for arg in self.args if isinstance(arg, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, which need not be the tensor's
            self.kernel[self.grid](*self.args, num_warps=self.num_warps, **self.constants)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Run ``kernel`` over ``grid``, or hand the launch to whoever intercepts launches."""
    request = Launch(kernel, grid, args, constants, num_warps)
    if _interceptor is None:
        request.run()
    else:
        _interceptor(request)


@contextmanager
def intercept_launches(interceptor: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the block no kernel runs; every launch goes to ``interceptor``, which may run it."""
    global _interceptor
    _interceptor = interceptor
    try:
        yield
    finally:
        _interceptor = None


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
