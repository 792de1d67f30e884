"""The training loop that every task shares."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.resume import load
from megatron_nepa.checkpoint.store import Progress, SaveError
from megatron_nepa.config import ConfigError, RunConfig, require
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.announce import describe_end, describe_failure, describe_start
from megatron_nepa.training.engine import TrainingEngine
from megatron_nepa.training.exit_codes import EXIT_TRAINING_FAILED
from megatron_nepa.training.figures import draw_figures
from megatron_nepa.training.flops import device_peak_flops
from megatron_nepa.training.log import RunLog, truncate_metrics
from megatron_nepa.training.lost_rank import LostRankWatch
from megatron_nepa.training.memory import memory_gb
from megatron_nepa.training.metrics import MetricWindow
from megatron_nepa.training.non_finite import describe_non_finite
from megatron_nepa.training.preemption import StopSignal, job_end_time
from megatron_nepa.training.run_directory import RunDirectory
from megatron_nepa.training.save_time import SaveTime, checkpoint_bytes
from megatron_nepa.training.schedule import warmup_cosine
from megatron_nepa.training.stall import StallWatch
from megatron_nepa.training.task import Task


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to look at."""


class RankTrainingError(TrainingError):
    """One rank cannot go on, and only it knows why."""


class RunStopped(RuntimeError):
    """A signal or the end of the job's time stopped the run early; its state is saved, the same command continues."""


def train(run: RunConfig, ds_config: dict[str, Any], task: Task, kernels: Kernels, topology: Topology) -> Progress:
    """Train ``task`` to the end of the run; every rank calls it.

    Continues from a checkpoint as ``run.resume`` says; writes metrics, checkpoints, figures under ``run.output_dir``.

    Returns:
        Where the run stands.

    Raises:
        RunStopped: after a signal, or shortly before the end of the Slurm job's time, once a checkpoint is saved.
        ConfigError: for a folder or checkpoint that does not fit, before anything is written.
        TrainingError: after ``run.max_skipped_steps`` non-finite steps in a row; where a checkpoint cannot be written.
    """
    directory = RunDirectory(run)
    found = directory.checkpoint_to_resume(topology, task.data_fingerprint)
    total_steps = run.total_steps(task.num_images)
    engine = TrainingEngine(task.build_model(kernels), run, ds_config, topology)
    progress, start = Progress(), None
    if found.checkpoint is not None:
        progress = load(engine.train_state, found.checkpoint, run.to_dict()["model"])
        engine.applied_steps, engine.skipped_in_a_row = progress.applied_steps, progress.skipped_in_a_row
    elif run.init_from is not None:
        start = start_from(engine.train_state, run.init_from, run.init_weights, run.model)
    if run.compile:
        for block in engine.module.trunk.blocks:  # type: ignore[union-attr, operator]
            block.compile()
    require(
        progress.samples % run.global_batch_size == 0,
        f"{found.checkpoint} stands at sample {progress.samples}, which is no multiple of global_batch_size "
        f"{run.global_batch_size}: keep the batch size, or start from its weights with --init_from.",
    )
    directory.lock(topology)  # every rank has checked the folder before the main one writes there

    peak = device_peak_flops(topology.device, DTYPES[run.dtype])
    log = None
    if topology.is_main:
        directory.record(
            {
                "data_fingerprint": task.data_fingerprint,
                "ds_config": ds_config,
                "kernels": kernels.describe(),
                "peak_flops": peak.flops,
            }
        )
        truncate_metrics(directory.metrics_path, progress.step)
        log = RunLog(directory.path, run, total_steps, progress.step)
        log.message(describe_start(run, engine, topology, kernels, found, progress, peak.source))
        if start is not None:
            log.message(start)
    loader = task.build_loader(progress.samples, directory.path / "bad_images.jsonl")
    window = MetricWindow((*task.metric_names, "grad_norm"), topology)
    warmup_steps = round(run.optimizer.warmup_ratio * total_steps)
    flops_per_step = task.flops_per_image * run.global_batch_size / topology.world_size
    save_time = SaveTime(checkpoint_bytes(engine.module, topology.tensor.size, engine.ema is not None))
    if log is not None:
        log.warn(save_time.warning())
    stop = StopSignal(topology.is_main, job_end_time(), save_time.seconds)
    lost = LostRankWatch(topology, EXIT_TRAINING_FAILED, orderly=(TrainingError,))
    stopped = None

    try:
        with stop, lost, StallWatch(topology, run.stall_timeout) as stall:
            last_end = time.perf_counter()
            while progress.step < total_steps:
                # one optimizer step
                learning_rate = warmup_cosine(
                    progress.step, total_steps, warmup_steps, run.learning_rate, run.optimizer.min_lr
                )
                metrics = torch.zeros(len(task.metric_names), device=topology.device)
                data_wait = 0.0
                for micro_batch in range(engine.accumulation_steps):
                    stall.at("waiting for data", progress.step + 1)
                    wait_start = time.perf_counter()
                    try:
                        batch = next(loader)
                    except ConfigError as error:  # of this rank's images: the other ranks do not know
                        raise RankTrainingError(f"rank {topology.rank}: {error}") from error
                    data_wait += time.perf_counter() - wait_start
                    stall.at("in the forward or backward pass", progress.step + 1)
                    loss, values = task.forward(engine, batch)
                    engine.backward(loss)
                    metrics += values / engine.accumulation_steps
                    if micro_batch < engine.accumulation_steps - 1:
                        engine.end_micro_batch()
                stall.at("in the weight update", progress.step + 1)
                result = engine.step(learning_rate)
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    samples=progress.samples + run.global_batch_size,
                    applied_steps=engine.applied_steps,
                    skipped_in_a_row=engine.skipped_in_a_row,
                )

                # what the log will want to know
                now = time.perf_counter()
                seconds, last_end = now - last_end, now
                row: dict[str, float | int] = {"step": progress.step}
                if task.num_images is not None:
                    row["epoch"] = progress.samples / task.num_images
                row |= {
                    "samples": progress.samples,
                    "lr": learning_rate,
                    "step_ms": seconds * 1e3,
                    "data_wait_ms": data_wait * 1e3,
                    "samples_per_second": run.global_batch_size / seconds,
                    "tflops_per_device": flops_per_step / seconds / 1e12,
                    "mfu": flops_per_step / seconds / peak.flops,
                    "memory_gb": memory_gb(topology.device),
                    "skipped_steps": progress.step - progress.applied_steps,
                    "bad_images": loader.num_bad_images,
                }
                window.add(row, torch.cat((metrics, result.grad_norm.view(1))))

                # decide together, then write
                stall.at("agreeing after the update", progress.step)
                reason = stop.agreed(topology.host_group, topology.world_size)
                is_last = progress.step == total_steps
                failed = progress.skipped_in_a_row >= run.max_skipped_steps
                saves = is_last or reason is not None or progress.step % run.save_every == 0
                if failed or saves or not result.applied or progress.step % run.log_every == 0:
                    rows, flat = window.read(task.health() if topology.is_main else None)
                    if log is not None:
                        rows[-1] |= task.read_health(flat)
                        log.write(rows)
                        for step, replicas in window.not_finite.items():
                            first_sample = progress.samples - (progress.step - step + 1) * run.global_batch_size
                            log.message(describe_non_finite(step, first_sample, replicas, run, topology))
                if failed:
                    raise TrainingError(describe_failure(run, progress, directory.checkpoints.latest()))
                if saves:
                    stall.at("saving the checkpoint", progress.step)
                    try:
                        path = directory.checkpoints.save(
                            engine.train_state, progress, engine.zero_stage, run.to_dict()
                        )
                    except SaveError as error:
                        raise TrainingError(str(error)) from error
                    last_end = time.perf_counter()  # the time to save is not the next step's
                    save_time.measured(last_end - now)
                    stop.save_seconds = save_time.seconds
                    if log is not None:
                        log.message(f"saved {path}")
                        log.warn(save_time.warning(seconds))
                if reason is not None and not is_last:
                    stopped = f"stopped by {reason} after step {progress.step}; the same command continues from there"
                    if log is not None:
                        log.message(stopped)
                    break
    finally:
        loader.close()
        if log is not None:
            log.close()
    if stopped is not None:
        # leave together: a launcher takes the first status that is not 0 for a failure and kills the others
        dist.barrier(topology.host_group)
        raise RunStopped(stopped)
    if topology.is_main:
        try:
            if directory.metrics_path.is_file():
                draw_figures(directory.metrics_path, directory.figures_path)
        except OSError as error:
            print(f"warning: the figures could not be drawn: {error}", flush=True)
        print(describe_end(directory, progress, total_steps), flush=True)
    return progress
