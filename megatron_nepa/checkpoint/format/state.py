"""What a checkpoint holds: logical tensors, whole or split over the tensor-parallel ranks, independent of the grid.

Every trainable parameter appears under its name as ``master.NAME`` (fp32), ``exp_avg.NAME``, ``exp_avg_sq.NAME``
(``momentum_buffer.NAME`` alone under LARS) and, where the run keeps an average, ``ema.NAME``; a frozen parameter as
``master.NAME`` alone. Fused projections are viewed as [sections, rows, ...], so that a split of every section is one
plain shard of the logical tensor. A buffer that the module itself counts as its state (BatchNorm's running statistics
and their count) is ``buffer.NAME``, the main rank's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from megatron_nepa.checkpoint.format.masters import Masters, fill_fragment, join_fragments
from megatron_nepa.checkpoint.format.shares import Piece, share_out
from megatron_nepa.parallel.parameters import layout_of
from megatron_nepa.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = ("momentum_buffer",)


@dataclass(frozen=True)
class TrainState:
    """The tensors of a run, where they live.

    Attributes:
        module: the model that the engine trains.
        masters: its fp32 weights and their optimizer.
        ema: the weight average, beside ``masters.flats``, or None.
        topology: this rank's place.
    """

    module: nn.Module
    masters: Masters
    ema: list[Tensor] | None
    topology: Topology


def collect_state(train: TrainState) -> dict[str, Tensor]:
    """A copy of this rank's share of the checkpoint in host memory; a collective over the data-parallel ranks.

    The fragments of a parameter are summed on one owner among the data-parallel ranks (a fragment plus zeros is exact),
    so each logical tensor is written once; ``shares.py`` says by whom, evenly. Training may go on meanwhile.

    At its peak the device holds 4 max(n) bytes more, with n the elements of this rank's part of a parameter: one tensor
    at a time is joined there. The host holds 4 S / R bytes, with S the elements of all the checkpoint's tensors and R
    the ranks of the run, as far as whole tensors divide evenly.
    """
    _seed_optimizer_state(train)
    topology = train.topology
    held = [
        (f"{kind}.{name}", name, param, flats)
        for name, param in train.module.named_parameters()
        for kind, flats in _kinds(train, param)
    ]
    pieces = {key: Piece(param.numel(), layout_of(param).split_dim is not None) for key, _, param, _ in held}
    owners = share_out(pieces, topology.data_size, topology.tensor.size)
    state: dict[str, Tensor] = {}
    for key, name, param, flats in held:
        owner = owners[key]
        if flats is None:
            local = param.detach()
        else:
            fragment = train.masters.fragments[name]
            local = join_fragments(param, fragment, flats, topology.data_group, owner.data_rank)
        if owner.is_at(topology.data_rank, topology.tensor.rank):
            state[key] = _logical(_to_host(local), param, topology)
    if topology.is_main:
        for name, buffer in persistent_buffers(train.module).items():
            state[f"buffer.{name}"] = _to_host(buffer)
    return state


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that ``module.state_dict()`` holds, where they live."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def stored_dtype(value: Tensor) -> torch.dtype:
    """A checkpoint holds fp32, and counts as they are."""
    return torch.float32 if value.is_floating_point() else value.dtype


def empty_state(train: TrainState) -> dict[str, Tensor]:
    """Tensors on the CPU to read a checkpoint into: whole replicated ones, this rank's part of split parameters.

    They take 4 K N bytes of host memory and none of the device's, with N the elements of this rank's parameters and K
    the kinds of tensors that are kept of each (4 under Adam with a weight average).
    """
    _seed_optimizer_state(train)
    state = {
        f"{kind}.{name}": _logical(torch.empty(param.shape), param, train.topology)
        for name, param in train.module.named_parameters()
        for kind, _ in _kinds(train, param)
    }
    return state | {f"buffer.{name}": value for name, value in _empty_buffers(train).items()}


@torch.no_grad()
def restore_state(train: TrainState, state: dict[str, Tensor]) -> None:
    """Copy :func:`empty_state`'s tensors, now filled, into the run: masters, moments, average, weights and buffers."""
    for name, param in train.module.named_parameters():
        for kind, flats in _kinds(train, param):
            value = state[f"{kind}.{name}"]
            if kind == "master":
                param.copy_(_local(value, param))
            fragment = train.masters.fragments.get(name)
            if flats is not None and fragment is not None:
                fill_fragment(flats, fragment, _local(value, param))
    for name, buffer in persistent_buffers(train.module).items():
        buffer.copy_(state[f"buffer.{name}"])


def empty_weights(train: TrainState) -> dict[str, Tensor]:
    """Tensors on the CPU to read weights into, under the names of the parameters and persistent buffers."""
    weights = {
        name: _logical(torch.empty(param.shape), param, train.topology)
        for name, param in train.module.named_parameters()
    }
    return weights | _empty_buffers(train)


@torch.no_grad()
def restore_weights(train: TrainState, weights: dict[str, Tensor]) -> None:
    """Copy tensors of :func:`empty_weights`, now filled, into a fresh run: masters, average, weights and buffers."""
    buffers = persistent_buffers(train.module)
    for name, value in weights.items():
        if name in buffers:
            buffers[name].copy_(value)
            continue
        param = train.module.get_parameter(name)
        local = _local(value, param)
        param.copy_(local)
        fragment = train.masters.fragments.get(name)
        for flats in (train.masters.flats, train.ema):
            if flats is not None and fragment is not None:
                fill_fragment(flats, fragment, local)


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of what an optimizer keeps of the gradients: Adam's two averages, or LARS's momentum."""
    return MOMENTS if "betas" in optimizer.defaults else MOMENTUM


def set_optimizer_step(train: TrainState, step: int) -> None:
    """Set the step count of Adam's bias correction.

    torch and DeepSpeed count in the state of each tensor, apex in the parameter groups, where nothing shows it before
    the first step: both are set, and an optimizer reads its own.
    """
    optimizer = train.masters.optimizer
    for flat in train.masters.flats:
        count = optimizer.state[flat].get("step")
        if isinstance(count, Tensor):
            count.fill_(step)
        else:
            optimizer.state[flat]["step"] = step
    for group in optimizer.param_groups:
        if isinstance(group.get("step"), Tensor):
            group["step"].fill_(step)
        else:
            group["step"] = step


def _kinds(train: TrainState, param: nn.Parameter) -> Iterator[tuple[str, list[Tensor] | None]]:
    """Each kind of tensor that is kept of a parameter, with the flats it lies in (None: in the parameter itself)."""
    if not param.requires_grad:
        yield "master", None
        return
    yield "master", train.masters.flats
    for kind in moments_of(train.masters.optimizer):
        yield kind, train.masters.companion(kind)
    if train.ema is not None:
        yield "ema", train.ema


def _to_host(value: Tensor) -> Tensor:
    # a copy even where it lies in host memory already: training changes it
    return value.detach().to("cpu", stored_dtype(value), copy=True)


def _empty_buffers(train: TrainState) -> dict[str, Tensor]:
    return {
        name: torch.empty(buffer.shape, dtype=stored_dtype(buffer))
        for name, buffer in persistent_buffers(train.module).items()
    }


def _seed_optimizer_state(train: TrainState) -> None:
    """Give a fresh optimizer the state that its first step would create, so that it can be saved or filled."""
    optimizer = train.masters.optimizer
    is_torch_adamw = isinstance(optimizer, torch.optim.AdamW)
    for flat in train.masters.flats:
        state: dict[str, Any] = optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), device=flat.device) if is_torch_adamw else 0
            state.update({kind: torch.zeros_like(flat) for kind in moments_of(optimizer)})


def _local(value: Tensor, param: nn.Parameter) -> Tensor:
    """This rank's part of a logical tensor, in its parameter's shape."""
    return (value.to_local() if isinstance(value, DTensor) else value).reshape(param.shape)


def _logical(local: Tensor, param: nn.Parameter, topology: Topology) -> Tensor:
    """A tensor in host memory as the part of a logical one, which stays in host memory."""
    layout = layout_of(param)
    if layout.split_dim is None:
        return local
    dim = layout.split_dim
    if layout.sections > 1:
        local, dim = local.view(layout.sections, -1, *local.shape[1:]), dim + 1
    if topology.tensor_host_mesh is None:
        return local
    # a mesh of GPUs would take the tensor back to the GPU
    return DTensor.from_local(local, topology.tensor_host_mesh, [Shard(dim)], run_check=False)
