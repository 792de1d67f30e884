"""Plans as text and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from megatron_nepa.config import PretrainingConfig
from megatron_nepa.planning.cluster import Gpu
from megatron_nepa.planning.command import start_command
from megatron_nepa.planning.communication import data_ring, tensor_ring
from megatron_nepa.planning.compute import Work, block_work, outer_work
from megatron_nepa.planning.plan import Plan
from megatron_nepa.planning.requirements import Requirements
from megatron_nepa.planning.stacks import count_all, stacks_of


def format_table(plans: list[Plan], needs: list[Requirements]) -> str:
    """A line a plan, best first."""
    head = (
        f"{'TP':>3} {'SP':<3}{'ZeRO':>5}{'micro':>6}{'x':>5} {'ckpt':<10}{'GB':>6} {'fits':<5}{'step ms':>10}"
        f"{'images/s':>11}{'MFU':>7}{'days':>8}{'GPU-hours':>11}{'waits':>7}"
    )
    lines = [head]
    for plan, need in zip(plans, needs, strict=True):
        layout, time = plan.layout, plan.time
        rate = f"{'< ' if plan.host_bound else ''}{plan.images_per_second:,.0f}"
        waits = (time.tensor_collectives + time.data_collectives) / time.total
        lines.append(
            f"{layout.tensor_parallel_size:>3} {_mark(layout.sequence_parallel):<3}{layout.zero_stage:>5}"
            f"{layout.micro_batch_size:>6}{plan.accumulation_steps:>5} {layout.activation_checkpointing:<10}"
            f"{plan.memory.total / 1e9:>6.1f} {'yes' if plan.fits else 'NO':<5}{time.total * 1e3:>10.1f}"
            f"{rate:>11}{plan.mfu:>7.1%}{need.days:>8.2f}{need.gpu_hours:>11,.0f}{waits:>7.1%}"
        )
    return "\n".join(lines)


def _mark(on: bool) -> str:
    return "yes" if on else "-"


def format_details(run: PretrainingConfig, plan: Plan, need: Requirements, gpu: Gpu) -> str:
    """The best plan at length: memory, time, collectives, kernels, data, and the command that starts it."""
    memory = "\n".join(f"  {name:<14}{amount / 1e9:>8.2f} GB" for name, amount in vars(plan.memory).items() if amount)
    time = "\n".join(
        f"  {name.replace('_', ' '):<20}{seconds * 1e3:>9.2f} ms{seconds / plan.time.total:>8.1%}"
        for name, seconds in vars(plan.time).items()
        if seconds
    )
    return "\n".join(
        [
            f"Best plan: {plan.layout.describe()}, accumulating {plan.accumulation_steps}",
            "",
            f"Memory of a GPU at its peak, {plan.memory.total / 1e9:.2f} of {gpu.memory_bytes / 1e9:.0f} GB:",
            memory,
            "",
            f"Time of a step, {plan.time.total * 1e3:.1f} ms (collectives: what nothing hides):",
            time,
            "",
            *_collective_lines(plan, gpu),
            "",
            *_kernel_lines(run, plan, gpu),
            "",
            f"Data: {need.images_per_node:,.0f} images/s a node, {need.read_bytes_per_node / 1e9:.2f} GB/s of JPEGs, "
            f"{need.cores_per_node:,.1f} CPU cores to decode them",
            f"Checkpoint: {need.checkpoint_bytes / 1e9:.1f} GB",
            f"Run: {need.steps:,} steps, {need.images:,} images, {need.days:.2f} days, {need.gpu_hours:,.0f} GPU-hours",
            "",
            f"Start it on {plan.layout.gpus} GPUs, your images for IMAGES (several nodes: examples/slurm/README.md):",
            f"  {start_command(run, plan.layout)}",
        ]
    )


def _collective_lines(plan: Plan, gpu: Gpu) -> list[str]:
    if not plan.collectives:
        return ["Collectives: none"]
    rings = {
        "a replica (tensor)": tensor_ring(gpu, plan.layout),
        "the same weights (data)": data_ring(gpu, plan.layout),
    }
    lines = [
        f"Ranks that share {what}: {ring.size} over {ring.link}, {ring.bandwidth / 1e9:.0f} GB/s each"
        for what, ring in rings.items()
        if ring.size > 1
    ]
    lines.append("Collectives (calls and GB of a micro-batch, or of a step where the phase is step):")
    lines.append(f"  {'what':<36}{'kind':<16}{'ranks':<8}{'phase':<11}{'calls':>6}{'GB':>9}{'ms':>9}  behind")
    for each, seconds in plan.collectives:
        lines.append(
            f"  {each.what:<36}{each.kind:<16}{each.group:<8}{each.phase:<11}{each.calls:>6}{each.bytes / 1e9:>9.3f}"
            f"{seconds * 1e3:>9.2f}  {(each.behind or '-').replace('_', ' ')}"
        )
    return lines


def _kernel_lines(run: PretrainingConfig, plan: Plan, gpu: Gpu) -> list[str]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for work, times in _all_work(run, plan, gpu):
        for i, amount in enumerate((work.flops, work.bytes, work.seconds)):
            totals[work.name][i] += times * amount
    lines = ["Kernels of a micro-batch, forward and backward, without recomputation:"]
    lines.append(f"  {'operation':<20}{'TFLOP':>9}{'GB':>9}{'ms':>9}")
    for name, (flops, moved, seconds) in totals.items():
        lines.append(f"  {name:<20}{flops / 1e12:>9.3f}{moved / 1e9:>9.2f}{seconds * 1e3:>9.2f}")
    return lines


def _all_work(run: PretrainingConfig, plan: Plan, gpu: Gpu) -> list[tuple[Work, int]]:
    """The kernels of a micro-batch, each with how many times it runs."""
    inside = [
        (work, stack.model.num_layers)
        for stack in stacks_of(run.model, plan.layout, run.objective)
        for work in block_work(stack.model, stack.layout, gpu)
        if stack.trained or work.phase == "forward"
    ]
    return inside + [(work, 1) for work in outer_work(run.model, plan.layout, gpu, run.objective)]


def to_dict(run: PretrainingConfig, plan: Plan, need: Requirements) -> dict[str, Any]:
    """Everything about a plan as plain values; bytes, seconds and images/s."""
    return {
        "layout": dataclasses.asdict(plan.layout) | {"data_parallel_size": plan.layout.data_parallel_size},
        "accumulation_steps": plan.accumulation_steps,
        "fits": plan.fits,
        "memory_bytes": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
        "step_seconds": dataclasses.asdict(plan.time) | {"total": plan.time.total},
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "host_bound": plan.host_bound,
        "collectives": [dataclasses.asdict(each) | {"seconds": seconds} for each, seconds in plan.collectives],
        "requirements": dataclasses.asdict(need),
        "command": start_command(run, plan.layout),
    }


def heading(run: PretrainingConfig, gpus: int, gpu: Gpu) -> str:
    """What is planned, in a line."""
    numbers = count_all(run.model, 1, run.objective).local
    return (
        f"{run.recipe} on {gpus} x {gpu.name}: {numbers / 1e6:,.1f} million parameters, "
        f"{run.global_batch_size:,} images a step. Predicted, not measured."
    )
