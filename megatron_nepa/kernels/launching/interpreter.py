"""Triton's interpreter as a proof bench: kernels run on the CPU, with the rounding of the hardware.

``TRITON_INTERPRET=1`` must stand in the environment before a kernel is defined. Triton 3.8's and 3.9's truncates
fp32 to bf16 where a GPU rounds to nearest even, which doubles the error of every bf16 result;
:func:`round_bf16_to_nearest` puts that right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def is_interpreting() -> bool:
    """Whether kernels defined now run in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


def round_bf16_to_nearest() -> None:
    """Make the interpreter's conversions between fp32 and bf16 exact or rounded to nearest even."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder.cast_impl, "rounds_to_nearest", False):
        return
    original = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bf16(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return original(self, src, dst_type)

    cast_impl.rounds_to_nearest = True  # type: ignore[attr-defined]
    builder.cast_impl = cast_impl


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
