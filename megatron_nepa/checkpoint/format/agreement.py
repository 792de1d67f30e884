"""Work whose failure on one rank is every rank's: none waits for a rank that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_nepa.parallel.topology import Topology

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Some rank's work failed; the message names the rank and its error."""


def on_all_ranks(topology: Topology, work: Callable[[], Result]) -> list[Result]:
    """Call ``work`` on every rank and return every rank's result; a collective on the host.

    Raises:
        RankError: on every rank, where it raised on any.
    """
    outcome: tuple[Any, str | None]
    try:
        outcome = (work(), None)
    except Exception as error:
        outcome = (None, str(error) or type(error).__name__)
    outcomes: list[Any] = [None] * topology.world_size
    dist.all_gather_object(outcomes, outcome, group=topology.host_group)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RankError(f"rank {rank}: {failure}")
    return [result for result, _ in outcomes]


def on_main_rank(topology: Topology, work: Callable[[], None]) -> None:
    """Call ``work`` on the main rank; all wait for it and fail with it (:class:`RankError`)."""
    on_all_ranks(topology, work if topology.is_main else lambda: None)
