"""What a run says at its start, its failure and its end."""

from __future__ import annotations

from pathlib import Path

from megatron_nepa.checkpoint.reading.resume import Found, describe_grid_change
from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import RunConfig
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.reporting.run_record import RunRecord, numbers_of_the_run


def describe_start(
    run: RunConfig,
    engine: TrainingEngine,
    topology: Topology,
    kernels: Kernels,
    found: Found,
    progress: Progress,
    total_steps: int,
    peak_source: str,
) -> str:
    """The lines before the first step: what is trained, on what, from where."""
    parameters = sum(
        param.numel() * (topology.tensor.size if getattr(param, "tensor_model_parallel", False) else 1)
        for param in engine.module.parameters()
    )
    shards = " with sequence parallelism" if run.parallel.sequence_parallel else ""
    lines = [
        f"{run.recipe}: {parameters / 1e6:.1f} M parameters in {run.trained_dtype}, lr {run.learning_rate:.3g}, "
        f"global batch {run.global_batch_size} = {topology.data_size} replicas x {engine.accumulation_steps} x "
        f"{run.micro_batch_size}",
        f"{topology.world_size} x {topology.device.type}: tensor parallel {topology.tensor.size}{shards}, "
        f"data parallel {topology.data_size}, ZeRO {engine.zero_stage}, {type(engine.masters.optimizer).__name__}",
        "kernels: " + ", ".join(f"{name} {served}" for name, served in kernels.describe().items()),
        f"MFU is of {peak_source}",
    ]
    average = run.average_decay(total_steps)
    if average.is_young(total_steps):
        remedy = "give --optimizer.ema_warmup, or --optimizer.ema_decay 0"
        if average.rise_steps is not None:
            remedy = "train for longer, or lower objective.momentum and with it optimizer.ema_decay"
        lines.append(
            f"warning: the weight average (optimizer.ema_decay {run.optimizer.ema_decay:g}) cannot follow a run of "
            f"{total_steps} steps: {average.initial_share(total_steps):.0%} of it will still be the weights "
            f"that the run began with; {remedy}"
        )
    lines += [f"warning: checkpoint passed over: {damage}" for damage in found.damage]
    if found.checkpoint is not None:
        lines.append(f"continuing {found.checkpoint} at step {progress.step}")
        change = describe_grid_change(found.manifest, topology, engine.zero_stage, run)
        if change:
            lines.append(f"resumed on another grid: {change}")
        theirs = numbers_of_the_run(found.manifest["run"])
        ours = numbers_of_the_run(run.to_dict())
        changed = [f"{key} {theirs.get(key)} -> {value}" for key, value in ours.items() if theirs.get(key) != value]
        if changed:
            lines.append(f"warning: settings differ from the checkpoint's: {', '.join(changed)}")
    return "\n".join(lines)


def describe_failure(run: RunConfig, progress: Progress, newest: Path | None) -> str:
    """Why a run ends that skipped too many steps, and what to look at."""
    count = progress.skipped_in_a_row
    return (
        f"the gradient was not finite in {count} steps in a row (steps {progress.step - count + 1} to {progress.step}, "
        f"samples {progress.samples - count * run.global_batch_size} to {progress.samples - 1}); their updates were "
        f"skipped. Look at metrics.jsonl for where the loss or gradient norm grew, and lower --base_lr "
        f"or raise --optimizer.warmup_ratio; the newest checkpoint is {newest or 'none'}."
    )


def describe_end(record: RunRecord, progress: Progress, total_steps: int, finished_before: bool = False) -> str:
    """The lines after the last step: where everything is."""
    figures = ", ".join(sorted(path.name for path in record.figures_path.glob("*.png")))
    already = ", the run was finished before: there was nothing left to train" if finished_before else ""
    return (
        f"step {progress.step} of {total_steps} done{already}\n"
        f"  checkpoint  {record.checkpoints.latest()}\n"
        f"  metrics     {record.metrics_path}\n"
        f"  figures     {record.figures_path}/{figures}"
    )
