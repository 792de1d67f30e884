"""One small training run on any grid, and how two of them are compared (the measure of equality of the whole suite)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_nepa.checkpoint.format.state import collect_state
from megatron_nepa.config import (
    ActivationCheckpointing,
    ModelConfig,
    NepaObjective,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainingConfig,
    RunConfig,
)
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.parallel.parameters import layout_of
from megatron_nepa.parallel.random import derive_key
from megatron_nepa.parallel.topology import Topology, build_topology
from megatron_nepa.training.engine.deepspeed_config import read_ds_config, resolve
from megatron_nepa.training.engine.engine import TrainingEngine

# T = 17, a prime; every switch that draws or sums something is on
MODEL = ModelConfig(
    image_size=56,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    mlp_hidden_size=96,
    qk_norm="affine",
    rope_rescale=2.0,
    position_embedding="learned",
    bos_token=True,
    drop_path=0.3,
)
LEARNING_RATE = 1e-3
SEED = 5


@dataclass(frozen=True)
class Grid:
    """How a case is spread: ``data_size`` replicas of ``tensor_size`` ranks each."""

    data_size: int = 1
    tensor_size: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 2
    micro_batch_size: int = 4
    activation_checkpointing: ActivationCheckpointing = "none"
    overlap_comm: bool = False
    reduce_bucket_size: int = 25_000_000
    chunk_bytes: int = 2**26

    @property
    def world_size(self) -> int:
        return self.data_size * self.tensor_size


@dataclass(frozen=True)
class Case:
    """What is trained; equal cases on different grids must give equal numbers."""

    grid: Grid = Grid()
    model: ModelConfig = MODEL
    objective: ObjectiveConfig = field(default_factory=lambda: NepaObjective(mask_ratio=0.4))
    dtype: str = "fp32"
    steps: int = 3
    global_batch_size: int = 8

    def on(self, **grid: Any) -> Case:
        """The same case on another grid."""
        return replace(self, grid=Grid(**grid))

    def build(self, run: RunConfig, topology: Topology, kernels: Kernels) -> nn.Module:
        """The model that is trained; other tasks' cases override it and :meth:`loss`."""
        assert isinstance(run, PretrainingConfig)
        return build_objective(run.model, run.objective, Build.of(run, topology.tensor, kernels))

    def loss(self, engine: TrainingEngine, images: Tensor, sample_index: Tensor) -> Tensor:
        """Loss of one micro-batch, equal on its tensor-parallel ranks."""
        loss: Tensor = engine.forward(images, sample_index, int(sample_index[0]) // self.global_batch_size).loss
        return loss


@dataclass
class Outcome:
    """Numbers of a run: per step, every gradient of step 1, every tensor at the end."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    replicas_equal: bool = True


Mutation = Callable[[nn.Module, Topology], None]


def build_run(case: Case) -> PretrainingConfig:
    grid = case.grid
    return PretrainingConfig(
        objective=case.objective,
        model=case.model,
        parallel=ParallelConfig(
            grid.tensor_size, grid.sequence_parallel, grid.activation_checkpointing, grid.chunk_bytes
        ),
        # with AdamW's usual epsilon an element whose gradient is near 0 would blow rounding up to a whole step
        optimizer=OptimizerConfig(ema_decay=0.9, eps=1e-4),
        steps=case.steps,
        global_batch_size=case.global_batch_size,
        micro_batch_size=grid.micro_batch_size,
        dtype=case.dtype,  # type: ignore[arg-type]
        seed=SEED,
    )


def build_engine(case: Case, mutation: Mutation | None = None, kernels: Kernels | None = None) -> TrainingEngine:
    """An engine on this rank's process group, with LayerScale and norms away from their blind initial values."""
    run, grid = build_run(case), case.grid
    topology = build_topology(torch.device("cpu"), grid.tensor_size)
    config = read_ds_config(None)
    config["zero_optimization"]["stage"] = grid.zero_stage
    config["zero_optimization"] |= {
        "overlap_comm": grid.overlap_comm,
        "reduce_bucket_size": grid.reduce_bucket_size,
    }
    if grid.zero_stage == 0:
        del config["data_types"]
    model = case.build(run, topology, kernels or Kernels())
    spread_vectors(model)
    if mutation is not None:
        mutation(model, topology)
    resolved = resolve(run, config, topology.data_size)
    return TrainingEngine(model, run, resolved, topology, decay=run.average_decay(case.steps))


@torch.no_grad()
def spread_vectors(model: nn.Module) -> None:
    """LayerScale in 0.3 to 0.7 and norm weights in 0.5 to 1.5: at 1e-5 a broken block would not show."""
    for name, param in model.named_parameters():
        if param.ndim == 1 and layout_of(param).split_dim is None:
            generator = torch.Generator().manual_seed(derive_key(SEED, f"spread/{name}"))
            draw = torch.rand(param.shape, generator=generator, dtype=torch.float64)
            if "layer_scale" in name:
                param.copy_(0.3 + 0.4 * draw)
            elif "norm" in name and not name.endswith("bias"):
                param.copy_(0.5 + draw)


def sample_images(sample: range, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Image k of the run is a function of k alone."""
    shape = (3, model.image_size, model.image_size)
    generators = [torch.Generator().manual_seed(1000 + k) for k in sample]
    return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators]).to(dtype)


def train_case(case: Case, mutation: Mutation | None = None, kernels: Kernels | None = None) -> Outcome:
    """Run a case on this rank's process group; the main rank's outcome holds the joined tensors."""
    engine = build_engine(case, mutation, kernels)
    outcome = Outcome()
    for step in range(case.steps):
        loss, grad_norm = train_step(engine, case, step)
        outcome.losses.append(loss)
        outcome.grad_norms.append(grad_norm)
        if step == 0:
            outcome.gradients = {
                name.removeprefix("exp_avg."): value / (1 - engine.run.optimizer.beta1)
                for name, value in join_state(engine).items()
                if name.startswith("exp_avg.")
            }
    outcome.state = join_state(engine)
    outcome.replicas_equal = replicas_equal(engine)
    return outcome


def train_step(engine: TrainingEngine, case: Case, step: int) -> tuple[float, float]:
    """One optimizer step, counted from 0: its loss over all replicas, and its gradient norm."""
    topology, micro = engine.topology, case.grid.micro_batch_size
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    total = torch.zeros(())
    for accumulation in range(engine.accumulation_steps):
        first = step * case.global_batch_size + (accumulation * topology.data_size + topology.data_rank) * micro
        sample_index = torch.arange(first, first + micro)
        local = local_samples(first, micro, topology)
        loss = case.loss(engine, sample_images(local, case.model, dtype), sample_index)
        engine.backward(loss)
        total += loss.detach() / engine.accumulation_steps
        if accumulation < engine.accumulation_steps - 1:
            engine.end_micro_batch()
    result = engine.step(LEARNING_RATE)
    assert result.applied
    dist.all_reduce(total, group=topology.data_group)
    return total.item() / topology.data_size, result.grad_norm.item()


def local_samples(first: int, micro: int, topology: Topology) -> range:
    """The samples whose images this tensor-parallel rank is given."""
    size, rank = topology.tensor.size, topology.tensor.rank
    if micro % size:
        return range(first, first + micro)
    share = micro // size
    return range(first + rank * share, first + (rank + 1) * share)


def join_state(engine: TrainingEngine) -> dict[str, Tensor]:
    """Every logical tensor whole, on every rank."""
    tensor_rank = engine.topology.tensor.rank
    mine: dict[str, tuple[int, int | None, Tensor]] = {}
    for name, value in collect_state(engine.train_state).items():
        if isinstance(value, DTensor):
            mine[name] = (tensor_rank, value.placements[0].dim, value.to_local().clone())  # type: ignore[attr-defined]
        else:
            mine[name] = (tensor_rank, None, value.clone())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    parts: dict[str, list[tuple[int, int | None, Tensor]]] = {}
    for rank_state in everyone:
        for name, part in rank_state.items():
            parts.setdefault(name, []).append(part)
    joined = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        dim = found[0][1]
        assert len(found) == (engine.topology.tensor.size if dim is not None else 1), name
        joined[name] = found[0][2] if dim is None else torch.cat([part[2] for part in found], dim)
    return joined


def replicas_equal(engine: TrainingEngine) -> bool:
    """Whether replicated parameters are bit-equal on all ranks, and split ones on all replicas."""
    for param in engine.module.parameters():
        split = layout_of(param).split_dim is not None
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, param.detach())
        size = engine.topology.tensor.size
        for rank, other in enumerate(everyone):
            if not torch.equal(other, everyone[rank % size if split else 0]):
                return False
    return True


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """Where two fp32 runs differ by more than rounding: empty where they are equal by the suite's measure.

    Loss 1e-6 absolute, gradient norm 1e-5 relative; each gradient of step 1, master, moment and average in norm, to
    2e-5 of its norm or of lr * sqrt(numel). Element by element would not do: Adam amplifies rounding where
    a gradient is near 0.
    """
    problems = [
        f"loss of step {i + 1}: {a} and {b}"
        for i, (a, b) in enumerate(zip(found.losses, expected.losses, strict=True))
        if not abs(a - b) <= 1e-6
    ]
    problems += [
        f"gradient norm of step {i + 1}: {a} and {b}"
        for i, (a, b) in enumerate(zip(found.grad_norms, expected.grad_norms, strict=True))
        if not abs(a - b) <= 1e-5 * b
    ]
    for kind, ours, theirs in (
        ("gradient", found.gradients, expected.gradients),
        ("state", found.state, expected.state),
    ):
        assert ours.keys() == theirs.keys()
        for name, b in theirs.items():
            error = (ours[name] - b).norm().item()
            bound = 2e-5 * max(b.norm().item(), LEARNING_RATE * b.numel() ** 0.5)
            if not error <= bound:
                problems.append(f"{kind} {name}: differs by {error:.3g}, more than {bound:.3g}")
    if not found.replicas_equal:
        problems.append("replicated parameters differ between ranks")
    return problems
