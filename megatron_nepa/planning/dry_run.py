"""A training step without a cluster: the real model under the real engine, on tensors without memory.

The process takes one rank's place in a process group without peers, so any number of ranks can be looked at. Shapes,
lifetimes and collectives are those of a GPU run with the Triton kernels; no number is computed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_nepa.config import IMAGE_CHANNELS, PretrainingConfig, require
from megatron_nepa.kernels.dispatch import fused_kernels
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.objectives.objective import PretrainingModel
from megatron_nepa.parallel.topology import TensorGroup, build_topology
from megatron_nepa.planning.communication import Collective
from megatron_nepa.planning.counting import Recorder, Traffic
from megatron_nepa.planning.layout import Layout
from megatron_nepa.planning.plan import Plan
from megatron_nepa.training.engine.deepspeed_config import read_ds_config, resolve
from megatron_nepa.training.engine.engine import TrainingEngine


@dataclass(frozen=True)
class Counted:
    """What one rank does in an optimizer step, after a first one that made the optimizer's state.

    Attributes:
        state_bytes: alive between steps: weights, masters, moments, average (ZeRO 1: and the accumulation).
        peak_bytes: largest live bytes of the step.
        micro_batch: collectives of the forward and backward pass of one micro-batch.
        step: collectives of the whole step.
    """

    state_bytes: int
    peak_bytes: int
    micro_batch: Traffic
    step: Traffic


def dry_run(run: PretrainingConfig, layout: Layout) -> Counted:
    """Count a step of ``run`` spread as ``layout`` says, as rank 0 sees it.

    Args:
        run: what is trained.
        layout: how it is spread.

    Raises:
        ConfigError: in a process that has joined a process group; for a layout that does not fit the run.
    """
    require(
        torch.__version__ >= "2.9",
        f"--dry_run needs torch 2.9 or newer, and this is {torch.__version__}.",
    )
    run = layout.apply(run)
    config = read_ds_config(None)
    config["zero_optimization"] |= {"stage": layout.zero_stage, "overlap_comm": layout.zero_stage == 2}
    resolved = resolve(run, config, layout.data_parallel_size)
    join_fake_group(layout.gpus)
    topology = build_topology(torch.device("cpu"), layout.tensor_parallel_size)
    model = build_without_memory(run, topology.tensor)
    recorder = Recorder()
    with warnings.catch_warnings(), FakeTensorMode(), recorder:
        warnings.simplefilter("ignore")
        _give_fake_parameters(model)
        engine = TrainingEngine(model, run, resolved, topology)
        _step(engine, run, layout, recorder)
        return _step(engine, run, layout, recorder)


def expected_traffic(collectives: Sequence[Collective], layout: Layout, accumulation_steps: int = 1) -> Traffic:
    """What the formulas say of ``accumulation_steps`` micro-batches and the step's end, in the counter's terms."""
    sizes = {"tensor": layout.tensor_parallel_size, "data": layout.data_parallel_size}
    traffic = Traffic()
    for each in collectives:
        key = (each.kind, sizes[each.group])
        times = 1 if each.phase == "step" else accumulation_steps
        traffic.calls[key] += times * each.calls
        traffic.bytes[key] += times * round(each.bytes)
    return traffic


def compare(plan: Plan, counted: Counted) -> str:
    """The formulas' numbers beside the counted ones, a line each."""
    rows = [("memory at the peak, GB", plan.memory.total / 1e9, counted.peak_bytes / 1e9)]
    expected = expected_traffic([each for each, _ in plan.collectives], plan.layout, plan.accumulation_steps)
    for kind, size in sorted(expected.calls):
        name, key = f"{kind} over {size} ranks", (kind, size)
        rows.append((f"{name}, calls", expected.calls[key], counted.step.calls[key]))
        rows.append((f"{name}, GB", expected.bytes[key] / 1e9, counted.step.bytes[key] / 1e9))
    lines = [f"  {'of a step':<38}{'formula':>12}{'counted':>12}"]
    for name, formula, count in rows:
        digits = 0 if name.endswith("calls") else 3
        lines.append(f"  {name:<38}{formula:>12,.{digits}f}{count:>12,.{digits}f}")
    return "\n".join([*lines, "  (calls to reduce: an estimate, since they depend on whose parts meet in a bucket)"])


def join_fake_group(world_size: int) -> None:
    """Make this process rank 0 of ``world_size`` ranks that are not there; every collective returns at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    require(not dist.is_initialized(), "a dry run needs a process that has not joined a process group.")
    # one rank a node for DeepSpeed, which would otherwise wait for the node's other ranks in shared memory
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_SIZE": "1"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def build_without_memory(run: PretrainingConfig, tensor: TensorGroup) -> PretrainingModel:
    """The model of ``run`` on the ``meta`` device, with the kernels of a GPU run."""
    with torch.device("meta"):
        return build_objective(run.model, run.objective, Build.of(run, tensor, fused_kernels()))


def _give_fake_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                fake = nn.Parameter(torch.empty(param.shape), requires_grad=param.requires_grad)
                # of what the layers note on a parameter, "constant" is also a name of FakeTensor's own
                vars(fake).update({key: value for key, value in vars(param).items() if key != "constant"})
                module._parameters[name] = fake
    model.to = lambda *_: model  # type: ignore[method-assign] # they are in place, and nn.Module would swap them


def _step(engine: TrainingEngine, run: PretrainingConfig, layout: Layout, recorder: Recorder) -> Counted:
    state = recorder.live
    recorder.start()
    shape = (layout.images_per_rank, IMAGE_CHANNELS, run.model.image_size, run.model.image_size)
    micro_batch = None
    for number in range(engine.accumulation_steps):
        images = torch.empty(shape, dtype=torch.bfloat16)
        output = engine.forward(images, torch.arange(run.micro_batch_size))
        engine.backward(output.loss)
        del output, images
        if micro_batch is None:
            micro_batch = Traffic(recorder.traffic.calls.copy(), recorder.traffic.bytes.copy())
        if number < engine.accumulation_steps - 1:
            engine.end_micro_batch()
    engine.step(1e-3)
    assert micro_batch is not None
    return Counted(state, recorder.peak, micro_batch, recorder.traffic)
