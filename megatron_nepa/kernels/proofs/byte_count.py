"""Bytes that the kernels move, counted: every load and store of the interpreter is summed under its mask.

Run as a program under ``TRITON_INTERPRET=1``: it prints, as JSON, a list of :class:`LaunchCount` for each recipe named
on its command line. It counts on one short sample; :func:`device_bytes` carries the counts over to the run's own shape.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.launching.launch import Launch, intercept_launches
from megatron_nepa.kernels.proofs.cases import model_cases

TOKENS = 32  # of the counted sample
CACHED_BYTES = 4 * 2**20  # a tensor up to this size stays in the cache: reading it again costs no device memory


@dataclass(frozen=True)
class LaunchCount:
    """What one launch moved, as multiples of the size of each tensor argument (0 for other arguments).

    Attributes:
        operation, direction: of the case.
        accessed: bytes loaded plus bytes stored, counting every repetition.
        touched: distinct bytes loaded plus distinct bytes stored.
    """

    operation: str
    direction: str
    accessed: list[float]
    touched: list[float]


def device_bytes(count: LaunchCount, launch: Launch) -> int:
    """Bytes between device memory and the chip for ``launch``, whose arguments may be of another size."""
    total = 0.0
    for arg, accessed, touched in zip(launch.args, count.accessed, count.touched, strict=True):
        if isinstance(arg, torch.Tensor):
            total += arg.nbytes * (touched if arg.nbytes <= CACHED_BYTES else accessed)
    return round(total)


def count_model(model: ModelConfig) -> list[LaunchCount]:
    """Run every case of ``model`` in the interpreter on one sample and count."""
    short = model_cases(model, batch=1, tokens=TOKENS, device="cpu")
    whole = model_cases(model, batch=1, tokens=model.sequence_length, device="cpu")
    # a sample's last row has no pair, so the loss is counted at the run's own length
    cases = [case for case in short if case.operation != "cosine_loss"]
    cases += [case for case in whole if case.operation == "cosine_loss"]
    return [_count(case.operation, case.direction, case.call) for case in cases]


def _count(operation: str, direction: str, call: Callable[[], object]) -> LaunchCount:
    counted: list[LaunchCount] = []

    def run(launch: Launch) -> None:
        with _recorded_accesses() as accesses:
            launch.run()
        accessed, touched = zip(*(_shares(arg, accesses) for arg in launch.args), strict=True)
        counted.append(LaunchCount(operation, direction, list(accessed), list(touched)))

    with intercept_launches(run):
        call()
    (count,) = counted
    return count


def _shares(arg: Any, accesses: list[np.ndarray]) -> tuple[float, float]:
    """Accessed and touched bytes of one argument, over its size; ``accesses`` are the addresses of loads and stores."""
    if not isinstance(arg, torch.Tensor) or arg.nbytes == 0:
        return 0.0, 0.0
    start, end, item = arg.data_ptr(), arg.data_ptr() + arg.nbytes, arg.element_size()
    inside = [addresses[(addresses >= start) & (addresses < end)] for addresses in accesses]
    accessed = sum(len(addresses) for addresses in inside)
    touched = sum(len(np.unique(addresses)) for addresses in inside)
    return accessed * item / arg.nbytes, touched * item / arg.nbytes


@contextmanager
def _recorded_accesses() -> Iterator[list[np.ndarray]]:
    """Record the unmasked addresses of every load and of every store: a list of two arrays, filled on leaving."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    loads: list[np.ndarray] = []
    stores: list[np.ndarray] = []
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def recorded_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        loads.append(ptrs.data[mask.data].ravel())
        return load(self, ptrs, mask, *rest)

    def recorded_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        stores.append(ptrs.data[mask.data].ravel())
        return store(self, ptrs, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = recorded_load, recorded_store
    accesses: list[np.ndarray] = []
    try:
        yield accesses
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
        accesses += [np.concatenate(found) if found else np.empty(0, np.uint64) for found in (loads, stores)]


def main() -> None:
    """Print the counts of the recipes named on the command line."""
    from megatron_nepa.recipes import PRETRAINING_RECIPES

    models = {name: PRETRAINING_RECIPES[name]().model for name in sys.argv[1:]}
    print(json.dumps({name: [asdict(count) for count in count_model(model)] for name, model in models.items()}))


if __name__ == "__main__":
    main()
