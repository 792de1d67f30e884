"""When the source of one rank's images is lost, all ranks stop before the step, so that a checkpoint can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_nepa.data.remote.folder import SourceLostError
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.stopping.errors import TrainingError
from megatron_nepa.training.task import Loader

Batch = TypeVar("Batch", covariant=True)


class DataLostError(TrainingError):
    """Some rank's images cannot be had; raised on every rank, before any of them begins the batch."""


class OnePass(Protocol[Batch]):
    """This rank's batches of a set, as many as every rank has."""

    @property
    def is_remote(self) -> bool:
        """Whether the images lie behind URLs."""

    def __iter__(self) -> Iterator[Batch]: ...


def agreed(batches: Iterable[Batch], topology: Topology) -> Iterator[Batch]:
    """Batches of remote images, of which the ranks agree before each that all of them have theirs.

    Without that the others would wait in the collectives that follow for a rank that has no images, and no checkpoint
    could be written. It costs an all-reduce of one integer on the host for each batch.

    Args:
        batches: of this rank, as many as every rank has.
        topology: this rank's place.

    Raises:
        DataLostError: on every rank.
    """
    iterator, end = iter(batches), object()
    while True:
        batch: Any = None
        lost = ""
        try:
            batch = next(iterator, end)
        except SourceLostError as error:
            lost = f"rank {topology.rank}: {error}"
        if topology.world_size > 1:
            flag = torch.tensor([int(bool(lost))], dtype=torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=topology.host_group)
            if int(flag):
                sentences: list[Any] = [None] * topology.world_size
                dist.all_gather_object(sentences, lost, group=topology.host_group)
                lost = next(sentence for sentence in sentences if sentence)
        if lost:
            raise DataLostError(lost)
        if batch is end:
            return
        yield batch


def evaluated(loader: OnePass[Batch], topology: Topology) -> Iterator[Batch]:
    """The batches of an evaluation; those of remote images are :func:`agreed`."""
    return agreed(loader, topology) if loader.is_remote else iter(loader)


class AgreedLoader:
    """A loader of remote images whose micro-batches are :func:`agreed`.

    Args:
        loader: of this rank.
        topology: this rank's place.
    """

    def __init__(self, loader: Loader, topology: Topology) -> None:
        self._loader, self._batches = loader, agreed(loader, topology)

    @property
    def num_bad_images(self) -> int:
        """As the loader's own."""
        return self._loader.num_bad_images

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()
