"""Which process of the run this is, by the launcher's variables, and how it meets the others."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_nepa.config import ConfigError, require

if TYPE_CHECKING:
    import torch.distributed as dist

RENDEZVOUS_SECONDS = 300.0
# Slurm gives the numbers from here on to what is no step of tasks: salloc's shell, the batch script, ...
_FIRST_SPECIAL_STEP = 4294967290
_RETRY_SECONDS = 0.5
_TORCH_SECONDS = 1800.0  # its own limit on waiting for another rank's part in setting up a group


@dataclass(frozen=True)
class Place:
    """One process of a run.

    Attributes:
        rank: in the run, from 0.
        world_size: processes of the run.
        local_rank: on this machine, from 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that a launcher's variables describe; without any the process is a run of its own.

    Understands those of deepspeed and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), then those of a step of ``srun``. What
    describes one process is a run of one, however much is missing.

    Args:
        environment: environment variables, as ``os.environ`` holds them.

    Raises:
        ConfigError: where the variables contradict each other.
    """
    step = _slurm_step(environment)
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None:
        if world_size in (None, step.world_size):
            _refuse_mpirun(environment, step)
            return step
        started = (
            f"srun's step has {step.world_size} tasks" if _in_slurm_step(environment) else "no launcher is at work"
        )
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but RANK is not set and {started}: start with deepspeed, torchrun or srun, "
            "or unset WORLD_SIZE."
        )
    if world_size is None:
        require(
            rank == 0,
            f"RANK is {rank}, but WORLD_SIZE is not set: start with deepspeed, torchrun or srun, or unset RANK.",
        )
        world_size = 1
    require(
        rank < world_size,
        f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are counted from 0; set both, or unset both.",
    )
    if world_size == 1:
        return Place()
    local_rank = _number(environment, "LOCAL_RANK")
    if local_rank is None:
        require(
            step.world_size == world_size,
            f"RANK is {rank} and WORLD_SIZE {world_size}, but LOCAL_RANK is not set: set it to the process's number on "
            "its machine, or start with deepspeed or torchrun, which do.",
        )
        local_rank = step.local_rank
    require(
        local_rank < world_size,
        f"LOCAL_RANK is {local_rank}, but WORLD_SIZE is {world_size}: it is counted from 0 on every machine.",
    )
    return Place(rank, world_size, local_rank)


def ranks_of_this_node(environment: Mapping[str, str]) -> int:
    """How many ranks of the run share this machine, by the variables of torchrun, deepspeed or ``srun``.

    Args:
        environment: environment variables, as ``os.environ`` holds them.

    Raises:
        ConfigError: where a variable is no number.
    """
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        number = _number(environment, name)
        if number is not None:
            return max(1, number)
    if _in_slurm_step(environment):
        # "8(x2),4": two nodes of 8 tasks, then one of 4
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        tasks = [int(count) for count, nodes in runs for _ in range(int(nodes or 1))]
        node = _number(environment, "SLURM_NODEID") or 0
        if node < len(tasks):
            return tasks[node]
    return max(1, _number(environment, "WORLD_SIZE") or 1)


def speaks_for_its_node(environment: Mapping[str, str]) -> bool:
    """Whether this process tells what every one of its machine would; never fails.

    Args:
        environment: environment variables, as ``os.environ`` holds them.
    """
    text = environment.get("LOCAL_RANK", "")
    return not text.isdigit() or int(text) == 0


def require_own_gpu(place: Place, visible_gpus: int) -> None:
    """Refuse a rank whose number on its machine is beyond the GPUs that it sees.

    Args:
        place: this process's.
        visible_gpus: on its machine, to this process.

    Raises:
        ConfigError: there is no GPU for it.
    """
    require(
        place.local_rank < visible_gpus,
        f"rank {place.rank} is number {place.local_rank + 1} of its machine, but sees {visible_gpus} GPU(s): start one "
        "rank a GPU and let each see all of them (Slurm: --gpus-per-node, without --gpus-per-task and --gpu-bind).",
    )


def require_rendezvous(environment: Mapping[str, str], world_size: int) -> None:
    """Refuse several ranks that cannot know where to meet.

    Args:
        environment: environment variables, as ``os.environ`` holds them.
        world_size: processes of the run.

    Raises:
        ConfigError: MASTER_ADDR or MASTER_PORT is missing, the latter is no port, the former no machine, or no network
            leads to it.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    require(
        not missing,
        f"{world_size} ranks were started without {' and '.join(missing)}: set MASTER_ADDR to the first node's name "
        "and MASTER_PORT to a free port of it, or start with deepspeed or torchrun, which do.",
    )
    port = _number(environment, "MASTER_PORT")
    require(port is not None and 0 < port < 65536, f"MASTER_PORT is {port}; it must be a port from 1 to 65535.")
    address = environment["MASTER_ADDR"]
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:  # torch would ask again until its time is over
        raise ConfigError(
            f"MASTER_ADDR is {address!r}, which names no machine from here ({error}): set it to the first node's name "
            "or address."
        ) from None
    require(
        any(_has_route(family, target) for family, _, _, _, target in found),
        f"MASTER_ADDR is {address}, and no network leads there from {socket.gethostname()}: see whether its interface "
        "is up (`ip link`; the loopback, lo, for 127.0.0.1).",
    )


def meet(place: Place, address: str, port: str, seconds: float = RENDEZVOUS_SECONDS) -> dist.Store:
    """The store in which the ranks of a run find each other; every rank calls it.

    A run of one opens no port.

    Args:
        place: this process's.
        address: of the first node, as MASTER_ADDR.
        port: on it, as MASTER_PORT.
        seconds: how long to wait for the other ranks.

    Raises:
        ConfigError: the port is taken, or not every rank came in time.
    """
    import torch.distributed as dist  # here, since a command reads the variables above without waiting for torch

    if place.world_size == 1:
        return dist.HashStore()
    if not _hosts_store(place):
        _await_first_rank(place, address, int(port), seconds)
    try:
        found = dist.rendezvous(
            "env://", rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=seconds)
        )
        store: dist.Store = next(iter(found))[0]
    except dist.DistError as error:
        raise ConfigError(_why_apart(str(error), place, f"{address}:{port}", seconds)) from None
    store.set_timeout(timedelta(seconds=_TORCH_SECONDS))
    return dist.PrefixStore("default_pg", store)


@contextlib.contextmanager
def forming_groups() -> Iterator[None]:
    """What torch raises where ranks that have met form no group, as a sentence.

    Raises:
        ConfigError: a rank went away, or gloo or NCCL found no network interface.
    """
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[enforce fail at [^\]]*\] ", "", str(error).strip())  # gloo's, a line of its source
        raise ConfigError(
            f"the ranks cannot form a group ({text.splitlines()[0] if text else type(error).__name__}): see whether "
            "each still runs, and whether the network interfaces between them are up (`ip link`; the loopback, lo, "
            "within a machine; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name others)."
        ) from None


def _has_route(family: int, target: tuple[object, ...]) -> bool:
    """Whether this machine knows a way to an address; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as trial:
        return trial.connect_ex(target) not in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def _hosts_store(place: Place) -> bool:
    """Whether this rank opens the port where all meet; under torchrun its agent does."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _await_first_rank(place: Place, address: str, port: int, seconds: float) -> None:
    """Wait until the port answers: torch would wait longer than it is told to, and print pages meanwhile."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(_RETRY_SECONDS, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > end:
                raise ConfigError(_why_apart(str(error), place, f"{address}:{port}", seconds)) from None
        time.sleep(_RETRY_SECONDS)


def _why_apart(text: str, place: Place, where: str, seconds: float) -> str:
    if "EADDRINUSE" in text or "address already in use" in text:
        return (
            f"the ranks cannot meet at {where}, a port that another program uses: give another one (deepspeed and "
            "torchrun: --master_port; srun: MASTER_PORT)."
        )
    joined = re.search(r"(\d+)/(\d+) clients joined", text)
    if joined:
        return (
            f"only {joined[1]} of {place.world_size} ranks came to {where} within {seconds:.0f} s: see what became of "
            "the others, or start as many as WORLD_SIZE says."
        )
    return (
        f"rank {place.rank} of {place.world_size} found no first rank at {where} within {seconds:.0f} s "
        f"({text.splitlines()[0] if text else 'no answer'}): see whether it runs and its node lets the port through."
    )


def _refuse_mpirun(environment: Mapping[str, str], step: Place) -> None:
    """Refuse one of several processes of mpirun, each of which would take itself for the whole run."""
    size = _number(environment, "OMPI_COMM_WORLD_SIZE") or _number(environment, "PMI_SIZE") or 1
    require(
        size == 1 or step.world_size > 1,
        f"mpirun started {size} processes, but RANK is not set: start with deepspeed, torchrun or srun, or set RANK, "
        "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each from mpirun's variables.",
    )


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    step = _number(environment, "SLURM_STEP_ID")
    return step is not None and step < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in environment


def _slurm_step(environment: Mapping[str, str]) -> Place:
    """The place in a step of ``srun``, which may be smaller than its job; a run of one outside of any."""
    if not _in_slurm_step(environment):
        return Place()
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS") or 1
    rank, local_rank = _number(environment, "SLURM_PROCID") or 0, _number(environment, "SLURM_LOCALID") or 0
    require(
        rank < tasks, f"SLURM_PROCID is {rank}, but the step has {tasks} tasks (SLURM_STEP_NUM_TASKS): use srun's own."
    )
    return Place(rank, tasks, local_rank)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable that counts something, None where it is not set or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    require(text.isascii() and text.isdigit(), f"{name} is {text!r}; it must be a number from 0, or not be set.")
    return int(text)
