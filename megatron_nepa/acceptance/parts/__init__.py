"""The parts, the cheapest and most decisive first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_nepa.acceptance.check import Check
from megatron_nepa.acceptance.setting import Setting


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        title: what it is about.
        module: in this folder, whose ``checks`` gives its checks.
        seconds: that it takes at most.
    """

    title: str
    module: str
    seconds: float

    def load(self) -> Callable[[Setting], list[Check]]:
        """Its checks, imported where they run: what is broken ends one part."""
        found: Callable[[Setting], list[Check]] = importlib.import_module(f"{__name__}.{self.module}").checks
        return found


PARTS = {
    "1": Part("versions, devices, every fused kernel against fp64", "kernels", 150),
    "2": Part("twenty steps under ZeRO-2: kernels, grids, resume", "training", 300),
    "3": Part("speed of kernels, attention and steps against the plan and the peer", "speed", 510),
    "4": Part("decoding on the GPU: pixels, damaged files, speed", "decoding", 210),
    "5": Part("optimizers, FlashAttention, checkpointing, offload, a non-finite step, a profile", "variants", 240),
    "6": Part("compute-sanitizer's memcheck over the kernels", "sanitizer", 90),
}
