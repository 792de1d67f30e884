"""What a restored optimizer does next, and where a checkpoint's tensors lie meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_nepa.checkpoint.format.masters import Fragment, Masters
from megatron_nepa.checkpoint.format.state import (
    TrainState,
    collect_state,
    empty_state,
    restore_state,
    set_optimizer_step,
)
from megatron_nepa.parallel.topology import TensorGroup, Topology, _host_mesh
from tests.distributed.cases import MODEL, Case, Grid, build_engine
from tests.distributed.ranks import run_ranks


class ApexAdam(torch.optim.Optimizer):
    """Stands for apex's FusedAdam, whose step count is in the parameter group, from the first step on."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                for kind, beta, new in zip(
                    ("exp_avg", "exp_avg_sq"), group["betas"], (param.grad, param.grad**2), strict=True
                ):
                    state[kind].lerp_(new, 1 - beta)
                mean, square = (
                    state[kind] / (1 - beta ** group["step"])
                    for kind, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True)
                )
                param -= group["lr"] * mean / (square.sqrt() + group["eps"])


def of_one_rank(module: nn.Module) -> TrainState:
    """A module without ZeRO, under the stand-in."""
    flats: list[Tensor] = list(module.parameters())
    optimizer = ApexAdam(flats)
    fragments = {name: Fragment(i, 0, 0, param.numel()) for i, (name, param) in enumerate(module.named_parameters())}
    topology: Any = SimpleNamespace(
        tensor=TensorGroup(), data_rank=0, data_size=1, data_group=None, tensor_host_mesh=None, is_main=True
    )
    return TrainState(module, Masters(optimizer, flats, dict(fragments)), None, topology)


def update(train: TrainState, step: int) -> None:
    for i, param in enumerate(train.module.parameters()):
        param.grad = torch.full_like(param, 1.0 + step + i)
    train.masters.optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_an_optimizer_that_counts_in_its_groups_goes_on_counting(steps: int) -> None:
    whole, resumed = (of_one_rank(nn.Linear(3, 2)) for _ in range(2))
    for step in range(steps):
        update(whole, step)
    state = empty_state(resumed)
    for key, value in collect_state(whole).items():
        state[key].copy_(value)
    restore_state(resumed, state)
    set_optimizer_step(resumed, steps)
    for train in (whole, resumed):
        update(train, steps)
    for expected, found in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(found, expected)


class OnGpus:
    """A mesh of GPUs where there are none."""

    device_type = "cuda"

    def __getitem__(self, name: str) -> OnGpus:
        return self


def devices_of_logical_tensors() -> list[tuple[str, str]]:
    """Device of each tensor that becomes part of a logical one, and of the mesh that it is put on."""
    asked: list[tuple[str, str]] = []
    real = DTensor.from_local

    def from_local(local: Tensor, mesh: Any, *rest: Any, **named: Any) -> DTensor:
        asked.append((local.device.type, mesh.device_type))
        return real(local, engine.topology.tensor_host_mesh, *rest, **named)

    engine = build_engine(Case(model=replace(MODEL, num_layers=1), grid=Grid(tensor_size=2)))
    train = replace(engine.train_state, topology=replace(engine.topology, mesh=OnGpus()))  # type: ignore[arg-type]
    DTensor.from_local = from_local  # type: ignore[method-assign, assignment]
    collect_state(train)
    saved = len(asked)
    assert saved > 0
    empty_state(train)
    assert len(asked) > saved
    return asked


def test_the_tensors_of_a_checkpoint_stay_in_host_memory() -> None:
    for asked in run_ranks(2, devices_of_logical_tensors):
        assert set(asked) == {("cpu", "cpu")}


def host_mesh_of_gpus(folder: Path) -> tuple[str, int, str]:
    """As on GPUs, where the device's own group cannot serve tensors in host memory."""
    topology: Topology = build_engine(Case(model=replace(MODEL, num_layers=1), grid=Grid(2, 2))).topology
    assert topology.tensor.group is not None
    mesh = _host_mesh(topology.tensor.group, torch.device("cuda", topology.rank))
    assert mesh.get_group() is not topology.tensor.group
    return mesh.device_type, mesh.get_local_rank(), str(mesh.get_group()._get_backend_name())


def test_a_mesh_of_gpus_has_one_in_host_memory_beside_it(tmp_path: Path) -> None:
    found = run_ranks(4, host_mesh_of_gpus, tmp_path)
    assert found == [("cpu", rank % 2, found[0][2]) for rank in range(4)]
    assert "gloo" in found[0][2]
