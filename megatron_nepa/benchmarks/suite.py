"""Runs every benchmark that this machine can, and writes the results page."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.benchmarks.results_page import (
    Entry,
    Result,
    describe_data,
    describe_forms,
    describe_index,
    describe_kernels,
    describe_order,
    describe_remote,
    describe_start,
    describe_train,
    read_results,
    render_page,
    write_results,
)
from megatron_nepa.config import require
from megatron_nepa.files import replace_text

if TYPE_CHECKING:
    import torch

TOOLS = Path(__file__).parents[2] / "tools"
DESCRIBE = {
    "train": describe_train,
    "kernels": describe_kernels,
    "data": describe_data,
    "order": describe_order,
    "index": describe_index,
    "forms": describe_forms,
    "remote": describe_remote,
    "start": describe_start,
}
ZERO2 = ("--ds_config", "ds_configs/zero2.json")


def _train(name: str, title: str, device: str, *arguments: str) -> Entry:
    return Entry(name, title, device, ("train", *ZERO2, *arguments))


def _accepted(name: str, title: str, part: str) -> Entry:
    return Entry(name, title, "cuda", ("--only", part), "acceptance.py")


ENTRIES = (
    _train(
        "cpu_b", "NEPA-B, release recipe, batch 8", "cpu",
        "--recipe", "nepa_b_release", "--micro_batch_size", "8", "--compile", "--baseline",
    ),
    _train("cpu_quickstart", "quickstart, batch 32", "cpu",
           "--recipe", "quickstart", "--timed_steps", "10", "--baseline"),
    Entry("cpu_data", "pre-training input", "cpu", ("data",)),
    Entry("cpu_forms", "pre-training input over the same images in several forms", "cpu", ("forms",)),
    Entry("cpu_order", "order of the images, batches of 256", "cpu", ("order",)),
    Entry("cpu_index", "encoded images served from an index of sparse files, batches of 64", "cpu", ("index",)),
    Entry("cpu_remote", "pre-training input, shards behind a web server beside tar shards here", "cpu", ("remote",)),
    Entry("cpu_start", "start of a run: the quickstart up to its first step, one rank", "cpu", ("start",)),
    _train("gpu_b_peer", "NEPA-B, release recipe, against the release's step", "cuda",
           "--recipe", "nepa_b_release", "--micro_batch_size", "128", "--compile", "--baseline"),
    _train("gpu_b", "NEPA-B", "cuda", "--recipe", "nepa_b"),
    _train("gpu_b_compile", "NEPA-B, compiled", "cuda", "--recipe", "nepa_b", "--compile"),
    _train("gpu_b_selective", "NEPA-B, selective activation checkpointing", "cuda",
           "--recipe", "nepa_b", "--activation_checkpointing", "selective"),
    _train("gpu_b_full", "NEPA-B, full activation checkpointing", "cuda",
           "--recipe", "nepa_b", "--activation_checkpointing", "full"),
    _train("gpu_l", "NEPA-L", "cuda", "--recipe", "nepa_l"),
    _train("gpu_l_compile", "NEPA-L, compiled", "cuda", "--recipe", "nepa_l", "--compile"),
    _train("gpu_l_selective", "NEPA-L, selective activation checkpointing", "cuda",
           "--recipe", "nepa_l", "--activation_checkpointing", "selective"),
    _train("gpu_l_full", "NEPA-L, full activation checkpointing", "cuda",
           "--recipe", "nepa_l", "--activation_checkpointing", "full"),
    Entry("gpu_kernels_b", "fused operations of NEPA-B", "cuda", ("kernels", "--recipe", "nepa_b")),
    Entry("gpu_kernels_l", "fused operations of NEPA-L", "cuda", ("kernels", "--recipe", "nepa_l")),
    Entry("gpu_data", "pre-training input, decoded on the CPU", "cuda", ("data",)),
    _accepted("gpu_b_plain", "NEPA-B, one process without an engine", "3"),
    _accepted("gpu_b_plain_compile", "NEPA-B, one process without an engine, compiled", "3"),
    _accepted("gpu_l_plain", "NEPA-L, one process without an engine", "3"),
    _accepted("gpu_l_plain_compile", "NEPA-L, one process without an engine, compiled", "3"),
    _accepted("gpu_decoding", "pre-training input, decoded on the GPU", "4"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``benchmark.py suite``."""
    parser.add_argument("--only", help=f"comma-separated rows of {', '.join(entry.name for entry in ENTRIES)}")
    parser.add_argument("--page", default=str(TOOLS / "RESULTS.md"), help="the page; its figures lie beside it as JSON")


def run(options: argparse.Namespace) -> None:
    """Measure row by row; the page is written after each.

    Raises:
        ConfigError: for an unknown row, or one of another kind of machine.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    page = Path(options.page)
    entries = choose(options.only, device)
    figures_path = page.with_suffix(".json")
    results = read_results(figures_path)
    for entry in entries:
        print(f"{entry.name}: {entry.command}", flush=True)
        try:
            report = measure(entry)
        except RuntimeError as error:  # one row should not cost the others
            print(f"{entry.name} failed: {error}", file=sys.stderr, flush=True)
            continue
        machine = Machine.here(device)
        results[entry.name] = Result(
            figures=DESCRIBE[entry.arguments[0]](report),
            machine=f"{machine.device}, {machine.threads} threads",
            versions=f"megatron_nepa {machine.project_version}, torch {machine.torch_version}",
            date=machine.date,
            command=entry.command,
        )
        write_results(figures_path, results)
        replace_text(page, render_page(ENTRIES, results))
        print(f"  {results[entry.name].figures}", flush=True)
    replace_text(page, render_page(ENTRIES, results))


def choose(only: str | None, device: torch.device) -> list[Entry]:
    """The rows that were asked for, or all of this kind of machine."""
    by_name = {entry.name: entry for entry in ENTRIES}
    if only is None:
        return [entry for entry in ENTRIES if entry.device == device.type and entry.tool == "benchmark.py"]
    chosen = []
    for name in only.split(","):
        require(name in by_name, f"--only {name} is unknown; there are {', '.join(by_name)}.")
        entry = by_name[name]
        require(entry.tool == "benchmark.py", f"--only {name} is measured by {entry.command}.")
        require(
            entry.device == device.type, f"--only {name} is a row for {entry.device}, this is a {device.type} machine."
        )
        chosen.append(entry)
    return chosen


def measure(entry: Entry) -> dict[str, Any]:
    """The JSON that an entry's command gives, run in a process of its own.

    Raises:
        RuntimeError: with the command's last line where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        to_file = entry.arguments[0] == "train"
        command = [sys.executable, str(TOOLS / "benchmark.py"), *entry.arguments, "--json"]
        result = subprocess.run(
            command + ([str(file)] if to_file else []), cwd=TOOLS.parent, capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError((result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1])
        report: dict[str, Any] = json.loads(file.read_text() if to_file else result.stdout.splitlines()[-1])
    return report
