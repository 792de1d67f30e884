"""Random draws keyed by what they are for, never by who draws them.

Every draw of a run is ``uniform(seed, purpose, layer, k)`` with k the sample's number in the run. The result depends on
nothing else: not on rank, device, micro-batch, call order or restart (principle: a run is a pure function of its
config).

The generator is splitmix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) applied to a counter under a hashed key. :func:`uniform` (numpy) and :func:`uniform_tensor`
(torch, any device, no host synchronisation) return equal numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def derive_key(seed: int, purpose: str, layer: int = 0) -> int:
    """A 64-bit key for the draws of one ``purpose`` (a word such as "drop_path") in one ``layer``."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(key: int, index: npt.NDArray[np.integer], count: int) -> npt.NDArray[np.float32]:
    """``count`` draws in [0, 1) for every sample number in ``index``.

    Args:
        key: from :func:`derive_key`.
        index: sample numbers, [n], non-negative.
        count: draws of each sample.

    Returns:
        fp32 [n, count], multiples of 2**-24.
    """
    row = words(key, np.asarray(index, np.uint64)[:, None])
    word = _mix_numpy(row + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    return (word >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def words(key: int, index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One 64-bit draw for every number in ``index``, of its shape."""
    return _mix_numpy(index * np.uint64(_GOLDEN) + np.uint64(key))


def uniform_tensor(key: int, index: Tensor, count: int) -> Tensor:
    """:func:`uniform` on ``index``'s device.

    Args:
        key: from :func:`derive_key`.
        index: sample numbers, int64 [n].
        count: draws of each sample.

    Returns:
        fp32 [n, count], bit-equal to :func:`uniform` of the same arguments.
    """
    steps = torch.arange(1, count + 1, device=index.device, dtype=torch.int64)
    row = _mix_tensor(index[:, None] * _signed(_GOLDEN) + _signed(key))
    word = _mix_tensor(row + steps * _signed(_GOLDEN))
    return _shift_right(word, 40).to(torch.float32) * 2.0**-24


def _mix_numpy(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch has no unsigned 64-bit arithmetic on every device; int64 shifts copy the sign bit, which the mask removes
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= _MASK_64
    return x - (1 << 64) if x >= 1 << 63 else x
