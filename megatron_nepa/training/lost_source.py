"""When the source of one rank's images is lost, all ranks stop before the step, so that a checkpoint can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_nepa.data.remote.folder import SourceLostError
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.task import Loader


class DataLostError(RuntimeError):
    """Some rank's images cannot be had; raised on every rank, before any of them begins the micro-batch."""


class AgreedLoader:
    """A loader of remote images whose ranks agree before each micro-batch that all of them have theirs.

    Without that the others would wait in the step's collectives for a rank that has no images, and no checkpoint could
    be written. It costs an all-reduce of one integer on the host for each micro-batch.

    Args:
        loader: of this rank.
        topology: this rank's place.
    """

    def __init__(self, loader: Loader, topology: Topology) -> None:
        self._loader, self._topology = loader, topology

    @property
    def num_bad_images(self) -> int:
        """As the loader's own."""
        return self._loader.num_bad_images

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch, lost = None, ""
        try:
            batch = next(self._loader)
        except SourceLostError as error:
            lost = f"rank {self._topology.rank}: {error}"
        if self._topology.world_size > 1:
            flag = torch.tensor([int(bool(lost))], dtype=torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._topology.host_group)
            if int(flag):
                sentences: list[Any] = [None] * self._topology.world_size
                dist.all_gather_object(sentences, lost, group=self._topology.host_group)
                lost = next(sentence for sentence in sentences if sentence)
        if lost:
            raise DataLostError(lost)
        return batch

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()
