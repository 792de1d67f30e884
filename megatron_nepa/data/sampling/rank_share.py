"""Which samples of the run one rank loads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_nepa.config import RunConfig, require
from megatron_nepa.data.sampling.order import IntArray
from megatron_nepa.parallel.topology import Topology


@dataclass(frozen=True)
class Share:
    """Which samples of the run one rank loads.

    Step s, accumulation m, replica r: samples ``s G + (m data_size + r) micro_batch_size + i``. Where tensor_size
    divides the micro-batch, each tensor-parallel rank decodes its equal part of it, otherwise the whole.
    """

    micro_batch_size: int
    global_batch_size: int
    accumulation_steps: int
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int

    def __post_init__(self) -> None:
        product = self.micro_batch_size * self.accumulation_steps * self.data_size
        require(
            product == self.global_batch_size,
            f"global_batch_size {self.global_batch_size} is not micro_batch_size {self.micro_batch_size} x "
            f"accumulation {self.accumulation_steps} x data-parallel size {self.data_size} = {product}.",
        )

    @classmethod
    def of(cls, run: RunConfig, topology: Topology) -> Share:
        """The share of the rank whose place is ``topology``."""
        return cls(
            run.micro_batch_size,
            run.global_batch_size,
            run.accumulation_steps(topology.data_size),
            topology.data_rank,
            topology.data_size,
            topology.tensor.rank,
            topology.tensor.size,
        )

    @property
    def local_size(self) -> int:
        """Images b that this rank decodes of each micro-batch."""
        divides = self.micro_batch_size % self.tensor_size == 0
        return self.micro_batch_size // self.tensor_size if divides else self.micro_batch_size

    @property
    def local_start(self) -> int:
        """Where this rank's images begin in the micro-batch."""
        return self.tensor_rank * self.local_size if self.local_size < self.micro_batch_size else 0

    def first_sample(self, micro_batch: int) -> int:
        """First sample of the replica's ``micro_batch``-th micro-batch, counted from the start of the run."""
        step, accumulation = divmod(micro_batch, self.accumulation_steps)
        place = accumulation * self.data_size + self.data_rank
        return step * self.global_batch_size + place * self.micro_batch_size

    def step_of(self, sample: int) -> int:
        """The optimizer step, counted from 0, that a sample belongs to."""
        return sample // self.global_batch_size

    def first_micro_batch(self, consumed_samples: int) -> int:
        """The micro-batch at which a run continues that has consumed this many samples."""
        require(
            consumed_samples >= 0 and consumed_samples % self.global_batch_size == 0,
            f"the run consumed {consumed_samples} samples, which is no multiple of global_batch_size "
            f"{self.global_batch_size}.",
        )
        return consumed_samples // self.global_batch_size * self.accumulation_steps

    def local_samples(self, micro_batch: int) -> IntArray:
        """The samples whose images this rank decodes of the replica's ``micro_batch``-th micro-batch, int64 [b]."""
        first = self.first_sample(micro_batch) + self.local_start
        return np.arange(first, first + self.local_size)

    def consumed_samples(self, micro_batch: int) -> int:
        """Samples of the steps completed before the ``micro_batch``-th micro-batch: inverse of first_micro_batch."""
        return micro_batch // self.accumulation_steps * self.global_batch_size
