"""Which rank does what: the (data, tensor) device mesh, its groups, and the ``mpu`` that DeepSpeed asks for."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_nepa.config import divisors, multiples_around, one_of, require
from megatron_nepa.parallel.launcher import (
    find_place,
    forming_groups,
    meet,
    ranks_of_this_node,
    require_own_gpu,
    require_rendezvous,
)


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share one replica, seen from one of them; size 1 needs no process group.

    Attributes:
        rank: this process's, of ``size``.
        group: of the ranks.
        name: the group's in torch's table of them, by which functional collectives find it; empty where there is none.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "" if self.group is None else self.group.group_name)


@dataclass(frozen=True)
class Topology:
    """This process's place in the run.

    Consecutive ranks form a tensor-parallel group, so that its traffic stays inside a node.
    """

    mesh: DeviceMesh
    device: torch.device
    tensor: TensorGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    # gloo group of all ranks: small host-side agreements (stop flags, messages) never touch the device
    host_group: dist.ProcessGroup
    # the tensor-parallel ranks once more, for tensors that lie in host memory; None at tensor-parallel size 1
    tensor_host_mesh: DeviceMesh | None

    @property
    def rank(self) -> int:
        """Rank in the whole run."""
        return self.data_rank * self.tensor.size + self.tensor.rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the whole run."""
        return self.data_size * self.tensor.size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the log, the metrics and the figures."""
        return self.rank == 0

    def mpu(self) -> ModelParallelUnit:
        """The object that DeepSpeed takes the groups from."""
        return ModelParallelUnit(self)


class ModelParallelUnit:
    """The ``mpu`` contract of DeepSpeed 0.19: exactly the methods that its engine and optimizers call.

    No ``get_sequence_parallel_*`` here: in DeepSpeed those names mean Ulysses, which changes the gradient divisor and
    the ZeRO group. Sharding token rows over the tensor-parallel ranks needs none of them.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._tensor_group = topology.mesh.get_group("tensor")

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.data_group

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._topology.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._topology.tensor.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor_group


def init_distributed() -> torch.device:
    """Join the process group that the launcher describes and return this rank's device, a GPU where there are any.

    :func:`.launcher.find_place` says which variables are understood; those that DeepSpeed reads are set.

    Raises:
        ConfigError: for variables that contradict each other, ranks that do not meet, no network, or no GPU for a rank.
    """
    # torch's notice of new names: releases without them are served as well
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    place = find_place(os.environ)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        require_own_gpu(place, torch.cuda.device_count())
    # DeepSpeed's count of this node's ranks on a CPU
    os.environ.setdefault("LOCAL_SIZE", str(ranks_of_this_node(os.environ) if place.world_size > 1 else 1))
    for name, value in (("RANK", place.rank), ("WORLD_SIZE", place.world_size), ("LOCAL_RANK", place.local_rank)):
        os.environ[name] = str(value)
    is_joined = dist.is_initialized()
    if place.world_size > 1 and not is_joined:
        require_rendezvous(os.environ, place.world_size)
    elif place.world_size == 1:  # DeepSpeed asks for them, nobody listens there
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "29500"
    device = torch.device(device_type, place.local_rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    if not is_joined:
        store = meet(place, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        # no device_id: it would form NCCL's communicator here and make every later group out of it, gloo's of the host
        # among them. It saves some start-up; that no group hangs with it was not seen on a GPU.
        backend = "nccl" if device_type == "cuda" else "gloo"
        with forming_groups():
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)
    return device


def build_topology(device: torch.device, tensor_parallel_size: int) -> Topology:
    """Divide the ranks into data-parallel replicas of ``tensor_parallel_size`` ranks each.

    Raises:
        ConfigError: where the tensor-parallel size does not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    require(
        world_size % tensor_parallel_size == 0,
        f"tensor_parallel_size {tensor_parallel_size} does not divide the number of ranks {world_size}: start "
        f"{one_of(multiples_around(world_size, tensor_parallel_size))} ranks (deepspeed --num_gpus), or take "
        f"tensor_parallel_size {one_of(divisors(world_size))}.",
    )
    shape = (world_size // tensor_parallel_size, tensor_parallel_size)
    with forming_groups():
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        host_group = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
    tensor = TensorGroup(
        rank=mesh.get_local_rank("tensor"),
        size=tensor_parallel_size,
        group=mesh.get_group("tensor") if tensor_parallel_size > 1 else None,
    )
    assert isinstance(host_group, dist.ProcessGroup)
    return Topology(
        mesh=mesh,
        device=device,
        tensor=tensor,
        data_rank=mesh.get_local_rank("data"),
        data_size=shape[0],
        data_group=mesh.get_group("data"),
        host_group=host_group,
        tensor_host_mesh=None if tensor.group is None else _host_mesh(tensor.group, device),
    )


def _host_mesh(group: dist.ProcessGroup, device: torch.device) -> DeviceMesh:
    if device.type != "cpu":
        ranks = dist.get_process_group_ranks(group)
        # its members alone take part: of thousands of replicas each makes its own
        host_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(host_group, dist.ProcessGroup)
        group = host_group
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tensor",))
