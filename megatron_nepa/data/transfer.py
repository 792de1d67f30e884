"""Copies from host memory to the training device that the host does not wait for."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """An array on a device; to a GPU through page-locked memory, in the order of the current stream.

    torch keeps the page-locked copy until the device has read it.

    Args:
        array: in host memory.
        device: where it is used.
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
