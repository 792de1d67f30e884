"""Times training steps of any recipe, alone or against the release's step in Hugging Face transformers."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.benchmarks.train.ceiling import measure_ceiling
from megatron_nepa.benchmarks.train.contender import (
    Build,
    Local,
    Remote,
    build_compiled_peer_steps,
    build_peer_steps,
    build_steps,
)
from megatron_nepa.benchmarks.train.report import Contest, Count, TrainReport
from megatron_nepa.benchmarks.train.rounds import WARMUP_STEPS, Probe, compete
from megatron_nepa.benchmarks.train.steps import TrainingSteps, build_setting
from megatron_nepa.config import require
from megatron_nepa.files import replace_text
from megatron_nepa.models.flops import train_flops
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.training.reporting.device_peak import measure_matmul

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
SHIPPED, REFERENCE = "megatron_nepa", "  reference kernels"
PEER, COMPILED_PEER = "release, transformers", "  the same, compiled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``benchmark.py train``, besides those of ``pretrain_nepa.py``."""
    parser.epilog = "All flags of pretrain_nepa.py serve as well: --recipe, --micro_batch_size, --data, --compile, ..."
    parser.add_argument("--timed_steps", type=int, default=3, help="optimizer steps of a round, after three")
    parser.add_argument("--rounds", type=int, default=3, help="steady rounds, of which the median counts")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="also time, in turns, the release's step in transformers, compiled too under --compile, and this code "
        "uncompiled with reference kernels",
    )
    parser.add_argument("--no_ceiling", action="store_true", help="do not time the parts of the step alone")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")


def run(options: argparse.Namespace, training_flags: Sequence[str]) -> TrainReport:
    """Measure and print; under ``torchrun`` every rank calls it.

    Raises:
        ConfigError: as ``pretrain_nepa.py`` would; for ``--baseline`` on several ranks or without transformers.
    """
    for name in ("timed_steps", "rounds", "accumulation"):
        require(getattr(options, name) >= 1, f"--{name} is {getattr(options, name)}; it must be at least 1.")
    target = None if options.json is None else Path(options.json)
    require(
        target is None or (target.parent.is_dir() and os.access(target.parent, os.W_OK) and not target.is_dir()),
        f"--json {options.json!r} cannot be written; give a file in a folder that is there.",
    )
    setting = build_setting(training_flags, options.accumulation)
    run, device, world_size = setting.run, setting.topology.device, setting.topology.world_size
    require(world_size == 1 or not options.baseline, "--baseline compares on one device; start one process.")
    matmul = measure_matmul(device, DTYPES[run.dtype], MATMUL_SIZE[device.type])

    communication, count = 0.0, Count(options.rounds)
    if world_size == 1:
        contests, count = compare(list(training_flags), run.global_batch_size, device, run.compile, options)
    else:  # every rank makes the same rounds
        local = Local(TrainingSteps(setting))
        local.time(WARMUP_STEPS)
        times = [local.time(options.timed_steps) for _ in range(options.rounds)]
        contests = [Contest(SHIPPED, run.global_batch_size, times, local.peak_memory_gb())]
        communication = local.communication_seconds()
    ceiling = {}
    if world_size == 1 and options.accumulation == 1 and not options.no_ceiling:
        ceiling = measure_ceiling(
            run.model, run.optimizer, run.micro_batch_size, device, DTYPES[run.dtype], compiled=run.compile
        )
    report = TrainReport(
        command=shlex.join(sys.argv),
        machine=Machine.here(device),
        recipe=run.recipe,
        dtype=run.dtype,
        devices=world_size,
        flops_per_image=float(train_flops(run.model)),
        matmul_flops=matmul,
        contests=contests,
        rounds=count,
        ceiling_ms=ceiling,
        communication_ms=communication * 1e3,
    )
    if setting.topology.is_main:
        for line in report.lines():
            print(line)
        if target is not None:
            replace_text(target, json.dumps(report.to_dict(), indent=2) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    return report


def compare(
    training_flags: list[str], images_per_step: int, device: torch.device, compiled: bool, options: argparse.Namespace
) -> tuple[list[Contest], Count]:
    """This code as asked for and, with ``--baseline``, with reference kernels and the peer; and the count of rounds."""
    builders: dict[str, tuple[Build, list[str]]] = {SHIPPED: (build_steps, training_flags)}
    if options.baseline:
        plain = [*training_flags, "--kernels=reference", "--compile=false"]
        builders |= {
            REFERENCE: (build_steps, plain),
            PEER: (build_peer_steps, training_flags),
        }
        if compiled:
            builders[COMPILED_PEER] = (build_compiled_peer_steps, training_flags)
    starts = {name: partial(Remote, *each, options.accumulation) for name, each in builders.items()}
    return compete(starts, images_per_step, options.rounds, options.timed_steps, partial(Probe.now, device))
