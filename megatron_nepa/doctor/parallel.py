"""A parallel training step against one rank's, and the bandwidth of the collectives that it uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import ModelConfig, OptimizerConfig, ParallelConfig, PretrainingConfig
from megatron_nepa.doctor.ranks import on_ranks
from megatron_nepa.doctor.report import Row
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.parallel.topology import build_topology
from megatron_nepa.training.engine.deepspeed_config import read_ds_config, resolve
from megatron_nepa.training.engine.engine import TrainingEngine

# LayerScale far from its initial value, at which a broken block would not show
MODEL = ModelConfig(
    image_size=56, hidden_size=64, num_layers=2, num_heads=4, mlp_hidden_size=96, bos_token=True, layer_scale_init=0.5
)
STEPS, BATCH = 2, 8
CPU_RANKS = 4
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4  # relative, of fp32
PAYLOAD = {"cpu": 2**22, "cuda": 2**28}  # bytes that every rank holds
REPEATS = 5


def check_parallel(device: torch.device) -> Iterator[Row]:
    """Tensor parallel 2 with sequence parallelism and ZeRO 2 over the GPUs, or over processes of the CPU."""
    name = "TP + SP + ZeRO-2 step"
    ranks = torch.cuda.device_count() // 2 * 2 if device.type == "cuda" else CPU_RANKS
    if ranks < 2:
        yield Row(name, "not checked", "needs two GPUs")
        yield Row("collectives", "not checked", "needs two GPUs")
        return
    backend = "NCCL" if device.type == "cuda" else "gloo"
    alone = on_ranks(1, device.type, partial(train_steps, tensor_parallel_size=1))[0]
    together = on_ranks(ranks, device.type, partial(train_steps, tensor_parallel_size=2))[0]
    yield compare(name, alone, together, f"{ranks} ranks over {backend}")
    for collective, bandwidth in on_ranks(ranks, device.type, bandwidths)[0].items():
        yield Row(collective, "ok", f"{bandwidth / 1e9:.2f} GB/s a rank, {ranks} ranks over {backend}")


def compare(name: str, alone: list[tuple[float, float]], together: list[tuple[float, float]], where: str) -> Row:
    """Whether losses and gradient norms of several ranks are those of one."""
    loss = max(abs(a - b) / max(abs(a), 0.1) for (a, _), (b, _) in zip(alone, together, strict=True))
    norm = max(abs(a - b) / a for (_, a), (_, b) in zip(alone, together, strict=True))
    text = f"{where}: loss within {loss:.1e} of one rank's, gradient norm within {norm:.1e}"
    if loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE:
        return Row(name, "ok", text)
    remedy = "run tests/distributed for the parameter that differs; train with --tensor_parallel_size 1 until then."
    return Row(name, "failed", text, remedy)


def train_steps(device: torch.device, tensor_parallel_size: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of some steps on this process group; equal on every grid."""
    parallel = ParallelConfig(tensor_parallel_size, sequence_parallel=tensor_parallel_size > 1)
    topology = build_topology(device, tensor_parallel_size)
    run = PretrainingConfig(
        model=MODEL,
        parallel=parallel,
        optimizer=OptimizerConfig(ema_decay=0.9, eps=1e-4),
        steps=STEPS,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // topology.data_size,
        dtype="fp32",
    )
    model = NepaForPretraining(MODEL, build=Build(parallel, topology.tensor))
    engine = TrainingEngine(model, run, resolve(run, read_ds_config(None), topology.data_size), topology)
    results = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, MODEL.image_size, MODEL.image_size, generator=generator)
        first = topology.data_rank * run.micro_batch_size
        local = images[first : first + run.micro_batch_size].to(device)
        # every rank is given its replica's whole micro-batch, or with whole rows of samples its share of it
        if run.micro_batch_size % topology.tensor.size == 0:
            local = local.chunk(topology.tensor.size)[topology.tensor.rank]
        sample_index = torch.arange(first, first + run.micro_batch_size, device=device) + step * BATCH
        loss = engine.forward(local, sample_index).loss
        engine.backward(loss)
        norm = engine.step(1e-3).grad_norm
        total = loss.detach().clone()
        dist.all_reduce(total, group=topology.data_group)
        results.append((total.item() / topology.data_size, norm.item()))
    return results


def bandwidths(device: torch.device) -> dict[str, float]:
    """Bytes a second that each rank sends in the collectives of training, the fastest of several calls.

    A ring's share counts: of n ranks each sends (n - 1) / n of the payload, in an all-reduce twice that.
    """
    size = dist.get_world_size()
    elements = PAYLOAD[device.type] // 4 // size * size
    whole, part = torch.zeros(elements, device=device), torch.zeros(elements // size, device=device)
    share = (size - 1) / size
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "all-reduce": (2 * share, lambda: dist.all_reduce(whole)),
        "all-gather": (share, lambda: dist.all_gather_into_tensor(whole, part)),
        "reduce-scatter": (share, lambda: dist.reduce_scatter_tensor(part, whole)),
        "broadcast": (1.0, lambda: dist.broadcast(whole, 0)),
    }
    return {name: factor * whole.nbytes / _fastest(call, whole) for name, (factor, call) in calls.items()}


def _fastest(call: Callable[[], object], tensor: Tensor) -> float:
    """Seconds of the fastest of several calls."""
    best = math.inf
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        call()
        tensor[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best
