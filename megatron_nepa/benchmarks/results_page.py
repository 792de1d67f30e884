"""The results page: every figure with its command, machine, versions and date, and the rows that wait for one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_nepa.config import ConfigError
from megatron_nepa.files import replace_text

TITLES = {"cpu": "On a CPU", "cuda": "On a GPU"}
INTRODUCTION = """# Results

Speed and memory as measured, each figure with the command that gave it. `python tools/benchmark.py suite` measures the
rows of the machine's kind and writes this page, `python tools/acceptance.py` those of a GPU that decide most; a row
without a figure has not been measured.
"""


@dataclass(frozen=True)
class Entry:
    """One row of the page.

    Attributes:
        name: short, for ``--only``.
        title: what is measured.
        device: cpu or cuda.
        arguments: arguments that the tool was given.
        tool: file in ``tools``; the suite measures those of ``benchmark.py``.
    """

    name: str
    title: str
    device: str
    arguments: tuple[str, ...]
    tool: str = "benchmark.py"

    @property
    def command(self) -> str:
        """What a reader types."""
        return " ".join(("python", f"tools/{self.tool}", *self.arguments))


@dataclass(frozen=True)
class Result:
    """What an entry's command measured.

    Attributes:
        figures: a sentence's worth.
        machine: device and threads.
        versions: versions of this project and torch.
        date: day of the measurement.
        command: the command that was run.
    """

    figures: str
    machine: str
    versions: str
    date: str
    command: str


def read_results(path: Path) -> dict[str, Result]:
    """Results by entry; none where there is no file yet."""
    if not path.is_file():
        return {}
    try:
        return {name: Result(**result) for name, result in json.loads(path.read_text()).items()}
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} does not hold the results of a suite ({error}): remove it.") from None


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    """Write the results, whole or not at all."""
    replace_text(path, json.dumps({name: asdict(result) for name, result in results.items()}, indent=2) + "\n")


def render_page(entries: Sequence[Entry], results: Mapping[str, Result]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for device, title in TITLES.items():
        rows = [f"## {title}\n", "| what | measured | machine, versions, date | command |", "|---|---|---|---|"]
        for entry in entries:
            if entry.device != device:
                continue
            result = results.get(entry.name)
            where = f"{result.machine}; {result.versions}; {result.date}" if result else ""
            command = result.command if result else entry.command
            rows.append(f"| {entry.title} | {result.figures if result else ''} | {where} | `{command}` |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def describe_train(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py train --json``."""
    first, *others = report["contests"]
    speeds = [first["images_per_step"] / time["seconds"] for time in first["times"]]
    text = (
        f"{report['dtype']}: {first['images_per_second']:.4g} images/s ({min(speeds):.4g} to {max(speeds):.4g}; "
        f"{report['rounds']}), "
        f"{first['tflops_per_device']:.3g} TFLOP/s = {first['share_of_matmul']:.0%} of a large matrix product, "
        f"peak {first['peak_memory_gb']:.2f} GB"
    )
    if report["share_of_ceiling"] is not None:
        text += f"; {report['share_of_ceiling']:.2f} of the speed of its parts timed alone"
    for other in others:
        text += f"; {other['first_over_this']:.2f}x {other['name'].strip()} (peak {other['peak_memory_gb']:.2f} GB)"
    return text


def describe_kernels(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py kernels --json``: forward and backward of each operation, fastest first."""
    by_operation: dict[str, list[tuple[float, str]]] = {}
    for timing in report["timings"]:
        if timing["total_ms"] is not None:
            by_operation.setdefault(timing["operation"], []).append((timing["total_ms"], timing["contender"]))
    return "; ".join(
        f"{operation}: " + ", ".join(f"{contender} {total:.3g} ms" for total, contender in sorted(found))
        for operation, found in by_operation.items()
    )


def describe_data(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py data --json``."""
    ratios = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in report["ratio"].items())
    return f"{report['images_per_second_per_core']:.0f} images/s a core as uint8; {ratios}"


def describe_order(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py order --json``."""
    return "; ".join(
        f"{timing['images']:,} images: {timing['microseconds']:.0f} us a batch, {timing['peak_mb']:.2g} MB at most"
        for timing in report["timings"]
    )


def describe_start(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py start --json``."""
    start, alone = report["start"], report["torch"]
    beyond = start["cpu_s"] - alone["cpu_s"]
    return (
        f"{beyond:.2f} s of CPU time beyond the {alone['cpu_s']:.2f} s of import torch, {start['opens']:,.0f} files "
        f"opened or asked for, {start['modules']:,.0f} modules; medians of {report['rounds']}"
    )


def describe_index(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py index --json``."""
    return "; ".join(
        f"{timing['images']:,} images: opened in {timing['open_ms']:.3g} ms, first batch after "
        f"{timing['first_ms']:.3g} ms, {timing['images_per_second']:,.0f} images/s "
        f"({timing['mb_per_second']:.0f} MB/s); process of {timing['settled_mb']:.0f} MB after "
        f"{timing['batches'] // 20:,} batches, {timing['peak_mb']:.0f} MB at most up to {timing['batches']:,}"
        for timing in report["timings"]
    )


def describe_forms(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py forms --json``."""
    cpu = report["cpu_ratio"]
    ratios = ", ".join(f"{name} {ratio:.3f}x ({cpu[name]:.3f}x)" for name, ratio in report["ratio"].items())
    speed = report["images_per_second"]["tar shards"]
    return f"tar shards {speed:.0f} images/s; of that (a second of CPU time) {ratios}"


def describe_remote(report: Mapping[str, Any]) -> str:
    """Figures of ``benchmark.py remote --json``."""
    speed, ratio = report["images_per_second"], report["ratio"]
    here = next(name for name in speed if name not in ratio)
    others = ", ".join(f"{ratio[name]:.2f} of that ({speed[name]:.0f} images/s) {name}" for name in ratio)
    return f"{here} {speed[here]:.0f} images/s; {others}"
