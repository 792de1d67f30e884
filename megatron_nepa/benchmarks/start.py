"""Measures the start of a run: what one rank computes and opens from the command to its first step.

Figures are CPU time, which other work on the machine changes little, beside that of ``import torch`` alone, in turns.
Opens are those that Python asks for, found or not; those of the dynamic linker are not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_nepa.config import require

# prints the CPU time of its process so far, the opens, and the modules
_TELL = """
import json, os, sys

opens = [0]

def count(event, arguments):
    opens[0] += event == "open"

sys.addaudithook(count)

def tell():
    times = os.times()
    print(json.dumps({"cpu_s": times.user + times.system, "opens": opens[0], "modules": len(sys.modules)}), flush=True)
    os._exit(0)
"""
_TORCH = _TELL + "import torch\ntell()"
_START = _TELL + "from megatron_nepa.benchmarks.start import reach_first_step\nreach_first_step(sys.argv[1:], tell)"


def reach_first_step(arguments: Sequence[str], arrived: Any) -> NoReturn:
    """Do what ``pretrain_nepa.py`` does up to its first step, and call ``arrived``, which ends the process.

    Args:
        arguments: flags of ``pretrain_nepa.py``.
        arrived: called without arguments.
    """
    from megatron_nepa.job import start_job
    from megatron_nepa.recipes import PRETRAINING_RECIPES

    job = start_job(arguments, "", PRETRAINING_RECIPES)

    from megatron_nepa.tasks.pretraining import PretrainingTask
    from megatron_nepa.training.loop import TrainingLoop
    from megatron_nepa.training.train import train

    # in place of the steps
    TrainingLoop.run_from = lambda loop, progress: arrived()  # type: ignore[method-assign, assignment]
    train(job.run, job.ds_config, PretrainingTask(job.run, job.topology), job.kernels, job.topology)
    raise AssertionError("unreachable")


def measure(arguments: Sequence[str], rounds: int) -> dict[str, Any]:
    """Medians over ``rounds`` starts with these flags, and as many of ``import torch``, in turns.

    Raises:
        RuntimeError: with its last line where a start fails.
    """
    torch_alone, starts = [], []
    for _ in range(rounds):
        torch_alone.append(_run(_TORCH))
        with tempfile.TemporaryDirectory() as folder:
            starts.append(_run(_START, *arguments, f"--output_dir={folder}/run"))
    sides = {"torch": torch_alone, "start": starts}
    return {
        name: {key: statistics.median(each[key] for each in side) for key in side[0]} for name, side in sides.items()
    }


def _run(code: str, *arguments: str) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tools/benchmark.py start``."""
    parser.add_argument("--rounds", type=int, default=5, help="starts that are measured")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Measure the quickstart's start and print."""
    require(options.rounds >= 1, f"--rounds is {options.rounds}; it must be at least 1.")
    measure((), 1)  # fills the caches: byte code, photographs, extensions
    report = measure((), options.rounds)
    if options.json:
        print(json.dumps({"rounds": options.rounds, **report}))
        return
    for name, side in report.items():
        print(f"{name:6s} {side['cpu_s']:6.2f} s of CPU time {side['opens']:7.0f} opens {side['modules']:7.0f} modules")
