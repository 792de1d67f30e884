"""The training that every task shares: set up, run the steps, end."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.reading.resume import load
from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import ConfigError, RunConfig, require
from megatron_nepa.data.decoding.timed_settings import settle
from megatron_nepa.data.index.agreement import compare_with_head
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine.compiled_blocks import compile_blocks
from megatron_nepa.training.engine.deepspeed_config import resolve
from megatron_nepa.training.engine.engine import TrainingEngine, import_deepspeed
from megatron_nepa.training.loop import TrainingLoop
from megatron_nepa.training.lost_source import AgreedLoader
from megatron_nepa.training.reporting.announce import describe_end, describe_start
from megatron_nepa.training.reporting.device_memory import reset_peak_memory
from megatron_nepa.training.reporting.device_peak import device_peak_flops
from megatron_nepa.training.reporting.log import Log, RunLog, SilentLog
from megatron_nepa.training.reporting.run_record import RunRecord
from megatron_nepa.training.reporting.waiting import waiting_for
from megatron_nepa.training.stopping.errors import RunStopped
from megatron_nepa.training.task import Task


def train(run: RunConfig, ds_config: dict[str, Any], task: Task, kernels: Kernels, topology: Topology) -> Progress:
    """Train ``task`` to the end of the run; every rank calls it.

    The config of DeepSpeed is as :func:`~megatron_nepa.training.engine.deepspeed_config.read_ds_config` returns it.
    Continues from a checkpoint as ``run.resume`` says; writes metrics, checkpoints, figures under ``run.output_dir``.

    Returns:
        Where the run stands.

    Raises:
        RunStopped: after a signal, or shortly before the end of the Slurm job's time, once a checkpoint is saved.
        ConfigError: for a folder or checkpoint that does not fit, before anything is written.
        TrainingError: after ``run.max_skipped_steps`` non-finite steps in a row; where a checkpoint cannot be written;
            where the source of remote images is lost, once a checkpoint is saved.
    """
    ds_config = resolve(run, ds_config, topology.data_size)
    record = RunRecord(run)
    with waiting_for(f"verifying the newest checkpoint in {record.path}", topology.is_main):
        found = record.checkpoint_to_resume(topology, task.data_fingerprint)
    total_steps = run.total_steps(task.num_images)
    require(
        run.profile is None or run.profiled_steps.start <= total_steps,
        f"--profile {run.profile} begins after the last of the run's {total_steps} steps: choose earlier ones.",
    )
    stands = found.manifest["progress"]["step"] if found.checkpoint is not None else 0
    asked = f"--steps {run.steps}" if run.steps is not None else f"--epochs {run.epochs} ({total_steps} steps)"
    require(
        stands <= total_steps,
        f"{asked} ends before step {stands} of {found.checkpoint}, which this run would continue: ask for more, or "
        "continue an older checkpoint with --resume PATH.",
    )
    unnamed = None
    if found.checkpoint is not None:
        unnamed = compare_with_head(
            f"the head of {found.checkpoint}",
            found.manifest["run"].get("classes"),
            task.classes,
            "the training images",
            "label the images as those were, or start from it with --init_from and --reset_head",
        )
    rates = task.learning_rates(total_steps)
    with waiting_for("importing DeepSpeed", topology.is_main):
        import_deepspeed()
    with waiting_for("drawing the weights", topology.is_main):
        model = task.build_model(kernels)
    with waiting_for("setting up DeepSpeed", topology.is_main):
        engine = TrainingEngine(model, run, ds_config, topology, rates.groups(model), run.average_decay(total_steps))
    progress, start = Progress(), None
    if found.checkpoint is not None:
        with waiting_for(f"reading {found.checkpoint}", topology.is_main):
            progress = load(engine.train_state, found.checkpoint, found.manifest, run.to_dict())
        engine.applied_steps, engine.skipped_in_a_row = progress.applied_steps, progress.skipped_in_a_row
    elif run.init_from is not None:
        with waiting_for(f"reading {run.init_from}", topology.is_main):
            start = start_from(
                engine.train_state, run.init_from, run.init_weights, run.model, task.reset_head, classes=task.classes
            )
    if run.compile:
        compile_blocks(engine.module)
    if progress.samples % run.global_batch_size:
        raise ConfigError(
            f"{found.checkpoint} stands at sample {progress.samples}, which is no multiple of global_batch_size "
            f"{run.global_batch_size}: take its --global_batch_size {found.manifest['run']['global_batch_size']}, or "
            "start from its weights with --init_from."
        )
    progress, data_said = task.data_state(progress, total_steps)
    record.lock(topology)  # every rank has checked the folder before the main one writes there

    with waiting_for("measuring this device's matrix products", topology.is_main):
        peak = device_peak_flops(topology.device, DTYPES[run.dtype])
    feed = Feed.of(run, topology, DTYPES[run.dtype], progress.samples, record.path / "bad_images.jsonl", progress.order)
    with waiting_for("timing the decoder", topology.is_main):
        kept = None if found.checkpoint is None else record.hw_decoder_load()
        data = settle(run.data, task.decoded(), feed, topology.host_group, kept)
    facts = {
        "data_fingerprint": task.data_fingerprint,
        "ds_config": ds_config,
        "kernels": kernels.describe(),
        "peak_flops": peak.flops,
        "decoder": {"num_threads": data.num_threads, "hw_decoder_load": data.hw_decoder_load},
    }
    record.write(topology, facts, progress.step)
    log: Log = SilentLog()
    if topology.is_main:
        log = RunLog(record.path, run, total_steps, progress.step)
        log.message(describe_start(run, engine, topology, kernels, found, progress, total_steps, peak.source))
        log.warn(start)
        log.warn(unnamed)
        for line in data_said:
            log.message(line)
    with waiting_for("building the data pipeline", topology.is_main):
        loader = task.build_loader(feed, data)
    if task.reads_remote:
        loader = AgreedLoader(loader, topology)
    loop = TrainingLoop(run, task, engine, loader, rates, record, total_steps, peak.flops, log)
    reset_peak_memory(topology.device)
    try:
        progress, stopped = loop.run_from(progress)
    finally:
        loader.close()
        log.close()
    if stopped is not None:
        log.message(stopped)  # below the progress bar, which is closed: the last line
        # leave together: a launcher takes the first status that is not 0 for a failure and kills the others
        dist.barrier(topology.host_group)
        record.unlock()
        raise RunStopped(stopped)
    if topology.is_main:
        try:
            if record.metrics_path.is_file():
                from megatron_nepa.training.reporting.curves import draw_figures  # brings matplotlib

                draw_figures(record.metrics_path, record.figures_path)
        except OSError as error:
            print(f"warning: the figures could not be drawn: {error}", flush=True)
        print(describe_end(record, progress, total_steps, finished_before=stands == total_steps), flush=True)
    record.unlock()
    return progress
