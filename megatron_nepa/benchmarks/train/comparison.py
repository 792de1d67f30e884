"""Times training steps of any recipe, alone or against the release's step in Hugging Face transformers."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.benchmarks.train.ceiling import measure_ceiling
from megatron_nepa.benchmarks.train.contender import (
    Build,
    Contender,
    Local,
    Remote,
    build_peer_steps,
    build_steps,
)
from megatron_nepa.benchmarks.train.report import Contest, TrainReport
from megatron_nepa.benchmarks.train.steps import TrainingSteps, build_setting
from megatron_nepa.config import require
from megatron_nepa.files import replace_text
from megatron_nepa.models.flops import train_flops
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.training.reporting.device_peak import measure_matmul

WARMUP_STEPS = 2  # the first allocates moments and compiles
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
SHIPPED, REFERENCE, PEER = "megatron_nepa", "  reference kernels", "release, transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``benchmark.py train``, besides those of ``pretrain_nepa.py``."""
    parser.epilog = "All flags of pretrain_nepa.py serve as well: --recipe, --micro_batch_size, --data, --compile, ..."
    parser.add_argument("--timed_steps", type=int, default=3, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="also time, in turns, the release's step in transformers, and this code uncompiled with reference kernels",
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

    contests, communication = [], 0.0
    if options.baseline:
        contests = compare(list(training_flags), run.global_batch_size, options)
    else:
        local = Local(TrainingSteps(setting))
        contests = contest({SHIPPED: local}, run.global_batch_size, options)
        if world_size > 1:
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


def compare(training_flags: list[str], images_per_step: int, options: argparse.Namespace) -> list[Contest]:
    """This code as asked for, with reference kernels, and the peer: a process each, timed in turns."""
    plain = [*training_flags, "--kernels=reference", "--compile=false"]
    builders: dict[str, tuple[Build, list[str]]] = {
        SHIPPED: (build_steps, training_flags),
        REFERENCE: (build_steps, plain),
        PEER: (build_peer_steps, training_flags),
    }
    contenders: dict[str, Remote] = {}
    try:
        for name, (build, arguments) in builders.items():
            contenders[name] = Remote(build, arguments, options.accumulation)
        return contest(contenders, images_per_step, options)
    finally:
        for contender in contenders.values():
            contender.close()


def contest(
    contenders: dict[str, Local] | dict[str, Remote], images_per_step: int, options: argparse.Namespace
) -> list[Contest]:
    """Warm up, then time every contender in each round, starting with another one each time."""
    contests = {name: Contest(name, images_per_step) for name in contenders}
    every: dict[str, Contender] = dict(contenders)
    for contender in every.values():
        contender.time(WARMUP_STEPS)
    names = list(every)
    for number in range(options.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            contests[name].times.append(every[name].time(options.timed_steps))
    for name, contender in every.items():
        contests[name].peak_memory_gb = contender.peak_memory_gb()
    return list(contests.values())
