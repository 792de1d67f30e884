"""Counting what really happens: live tensor bytes and collectives, seen by a dispatch mode."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# the c10d operators that DeepSpeed and torch.distributed's own functions call, and which of their arguments is the
# whole tensor
_COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
}
# and the functional ones that this project calls
_FUNCTIONAL = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
}


@dataclass
class Traffic:
    """Collectives by (kind, ranks of the group).

    Attributes:
        calls: how many.
        bytes: sum of the whole tensors: what an all-gather returns, what a reduction is given.
    """

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, int]] = field(default_factory=Counter)


class Recorder(TorchDispatchMode):
    """Sum the bytes of all storages that operations made while it was on and that are still alive.

    Tensors on the ``meta`` device have no bytes. Under a ``FakeTensorMode`` enter that one first; a host read
    (``item()``) then gives 0, so that a training step whose branches depend on one runs through.

    Attributes:
        live: bytes now.
        peak: largest ``live`` since :meth:`start`.
        traffic: collectives since :meth:`start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.traffic = Traffic()
        self._known: set[int] = set()

    def start(self) -> None:
        """Begin anew with peak and traffic."""
        self.peak, self.traffic = self.live, Traffic()

    def track(self, tensor: Tensor) -> None:
        """Count a tensor that was made before."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 0.0
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        if func.namespace == "c10d":
            self._record_collective(func, args)
        elif func.namespace == "_c10d_functional":
            self._record_functional(func, args, result)
        return result

    def _record_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        operator = func.overloadpacket.__name__
        if operator not in _COLLECTIVES:
            return
        kind, index = _COLLECTIVES[operator]
        whole = sum(leaf.nbytes for leaf in tree_leaves(args[index]) if isinstance(leaf, Tensor))
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        self._add(kind, dist.ProcessGroup.unbox(group).size(), whole)

    def _record_functional(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        operator = func.overloadpacket.__name__
        if operator in _FUNCTIONAL:
            size = dist.distributed_c10d._resolve_process_group(args[-1]).size()
            self._add(_FUNCTIONAL[operator], size, max(args[0].nbytes, result.nbytes))

    def _add(self, kind: str, size: int, whole: int) -> None:
        self.traffic.calls[kind, size] += 1
        self.traffic.bytes[kind, size] += whole


def _is_fake(tensor: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
