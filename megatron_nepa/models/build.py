"""What every model is built with besides its own shape."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nepa.config import ParallelConfig, RunConfig
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.parallel.topology import TensorGroup


@dataclass(frozen=True)
class Build:
    """How a model is spread, computed and drawn; the default is one rank with torch's kernels and seed 0.

    Attributes:
        parallel: tensor and sequence parallelism, activation checkpointing.
        tensor: ranks that share the replica, as many as ``parallel`` says.
        kernels: implementations of the fused operations.
        seed: of the run: of the initial weights, which do not depend on the parallel sizes, and of the draws of
            training mode.
    """

    parallel: ParallelConfig = ParallelConfig()
    tensor: TensorGroup = TensorGroup()
    kernels: Kernels = Kernels()
    seed: int = 0

    @classmethod
    def of(cls, run: RunConfig, tensor: TensorGroup, kernels: Kernels) -> Build:
        """What a run's model is built with."""
        return cls(run.parallel, tensor, kernels, run.seed)
