"""The command: which parts, where the report lies, and the table at the end."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from megatron_nepa.acceptance.parts import PARTS
from megatron_nepa.acceptance.report import Report
from megatron_nepa.acceptance.runner import Runner, numbers, titles
from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.benchmarks.results_page import Result, read_results, render_page, write_results
from megatron_nepa.benchmarks.suite import ENTRIES, TOOLS
from megatron_nepa.config import ConfigError, require
from megatron_nepa.files import AlreadyHeldError, Hold, replace_text

DESCRIPTION = """Prove on one GPU what only a GPU can show: 25 minutes, the first verdict within 3.

    python tools/acceptance.py                 all parts, the cheapest and most decisive first
    python tools/acceptance.py --only 1,3      some of them
    python tools/acceptance.py                 once more: goes on where it was interrupted
    python tools/acceptance.py --rehearsal     on a CPU: the GPU's rows at toy sizes, through a stand-in for CUDA

Every check ends in PASS, FAIL or NOT RUN, with its figure, what it means and what to do. What is right and slow fails
too: a kernel below 60 % of the bandwidth of a copy, a step below two thirds of the planner's MFU. A package that is not
installed makes its rows NOT RUN, and the row says what to carry along; parts 1 and 3 need only torch, numpy, triton.
Needs no network. The report is written after each check; ends with status 1 where something failed."""


def main(arguments: list[str] | None = None) -> int:
    """Run, show and write; 1 where something failed.

    Raises:
        ConfigError: for parts that there are not, or a report that cannot be continued.
    """
    options = _parser().parse_args(arguments)
    chosen = numbers(options.only)
    # here: --help and a mistake in the flags do not wait for torch
    import torch

    from megatron_nepa.acceptance.device_calls import device_calls

    require(options.patience > 0, f"--patience is {options.patience}; it must be above 0.")
    require(
        not (options.rehearsal and torch.cuda.is_available()),
        "--rehearsal is for a machine without a GPU; this one has one: leave the flag out.",
    )
    folder = Path(options.output_dir)
    machine = Machine.here(device_calls(options.rehearsal).device)
    report = Report(folder, machine, options.rehearsal, titles())
    try:
        hold = Hold(folder / ".held")
    except AlreadyHeldError as error:
        raise ConfigError(f"{error}: give another --output_dir, or wait.") from None
    try:
        return _run(options, chosen, report)
    finally:
        hold.release()


def _run(options: argparse.Namespace, chosen: list[str], report: Report) -> int:
    import torch

    work = report.json_path.parent / "work"
    work.mkdir(exist_ok=True)
    if options.again:
        report.forget(chosen)
    start = time.monotonic()
    runner = Runner(report, work, options.patience, lambda text: print(text, flush=True))
    for number in chosen:
        runner.run(number)
        if torch.cuda.is_available():
            fill_results(Path(options.page), report)
    print(f"\n{report.markdown()}")
    print(f"{time.monotonic() - start:.0f} s; {report.markdown_path} and {report.json_path.name} hold this table.")
    return int(report.counts()["FAIL"] > 0)


def fill_results(page: Path, report: Report) -> None:
    """Write what the report measured into the results page and its figures, where they can be written."""
    machine = report.machine
    figures = {name: text for entry in report.entries() for row in entry.rows for name, text in row.results.items()}
    commands = {entry.name: entry.command for entry in ENTRIES}
    if not figures or not os.access(page.parent, os.W_OK):
        return
    path = page.with_suffix(".json")
    results = read_results(path)
    for name, text in figures.items():
        results[name] = Result(
            figures=text,
            machine=f"{machine.device}, {machine.threads} threads",
            versions=f"megatron_nepa {machine.project_version}, torch {machine.torch_version}",
            date=machine.date,
            command=commands[name],
        )
    write_results(path, results)
    replace_text(page, render_page(ENTRIES, results))


def _parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {number}  {title}" for number, title in titles().items())
    parser = argparse.ArgumentParser(
        "acceptance",
        description=DESCRIPTION,
        epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help=f"comma-separated parts of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output_dir", default="runs/acceptance", help="of the report (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="forget what the report says of these parts")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on all times, for slow disks and old GPUs")
    parser.add_argument("--rehearsal", action="store_true", help="on a CPU: see that this tool works")
    parser.add_argument("--page", default=str(TOOLS / "RESULTS.md"), help="results page that a GPU's figures go to")
    return parser
