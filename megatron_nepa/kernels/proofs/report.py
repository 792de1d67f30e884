"""The kernel report: what every kernel compiles to and how many bytes it moves, without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass

from megatron_nepa.config import ModelConfig, require
from megatron_nepa.hardware import data_sheet
from megatron_nepa.kernels.launching.interpreter import is_interpreting
from megatron_nepa.kernels.launching.launch import Launch, intercept_launches
from megatron_nepa.kernels.proofs.byte_count import LaunchCount, device_bytes
from megatron_nepa.kernels.proofs.cases import model_cases
from megatron_nepa.kernels.proofs.machine_code import MachineCode, compile_launch
from megatron_nepa.recipes import PRETRAINING_RECIPES

ALLOWANCE = 1.05  # on the minimum, for statistics, tables, parameters and partial sums


@dataclass(frozen=True)
class Row:
    """One kernel of one recipe on one architecture."""

    recipe: str
    arch: str
    operation: str
    direction: str
    code: MachineCode
    device_bytes: int
    minimum_bytes: int

    @property
    def microseconds(self) -> float:
        """Time at H100 bandwidth if nothing but device memory limits the kernel: a prediction, not a measurement."""
        h100 = data_sheet("NVIDIA H100 80GB HBM3")
        assert h100 is not None
        return self.device_bytes / h100.memory_bandwidth * 1e6

    @property
    def faults(self) -> list[str]:
        """Why this kernel fails the report."""
        code = self.code
        found = []
        if code.spilled_bytes:
            found.append(f"spills {code.spilled_bytes} bytes")
        if code.local:
            found.append(f"{code.local} accesses to local memory")
        if code.narrow or not code.wide_loads:
            found.append(f"{code.narrow} accesses of 1 or 2 bytes, {code.wide_loads} loads of 16")
        if self.device_bytes > ALLOWANCE * self.minimum_bytes:
            found.append(f"moves {self.device_bytes} bytes, more than {ALLOWANCE} x {self.minimum_bytes}")
        return found


def build_report(recipes: list[str], archs: list[str]) -> list[Row]:
    """Compile and count every kernel of ``recipes`` at their own shapes (micro-batch, T, D, F, heads).

    Raises:
        ConfigError: in a process whose kernels run in the interpreter, since those cannot be compiled.
    """
    require(not is_interpreting(), "TRITON_INTERPRET is set; unset it: the report compiles kernels.")
    counts = count_bytes(recipes)
    rows = []
    for name in recipes:
        run = PRETRAINING_RECIPES[name]()
        for (operation, direction, minimum, launch), count in zip(
            _launches(run.model, run.micro_batch_size), counts[name], strict=True
        ):
            moved = device_bytes(count, launch)
            rows += [
                Row(name, arch, operation, direction, compile_launch(launch, arch), moved, minimum) for arch in archs
            ]
    return rows


def count_bytes(recipes: list[str]) -> dict[str, list[LaunchCount]]:
    """Counts of :mod:`.byte_count`, which needs a process of its own for the interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", "megatron_nepa.kernels.proofs.byte_count", *recipes],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {name: [LaunchCount(**count) for count in counts] for name, counts in json.loads(result.stdout).items()}


def _launches(model: ModelConfig, batch: int) -> list[tuple[str, str, int, Launch]]:
    """Operation, direction, minimum bytes and launch of every case, recorded on tensors without memory."""
    launches = []
    for case in model_cases(model, batch, model.sequence_length, "meta"):
        recorded: list[Launch] = []
        with intercept_launches(recorded.append):
            case.call()
        (launch,) = recorded
        launches.append((case.operation, case.direction, case.minimum_bytes, launch))
    return launches


def format_table(rows: list[Row]) -> str:
    """The report as text, a line a kernel."""
    lines = [
        f"{'recipe':<10}{'arch':<7}{'operation':<21}{'direction':<10}{'regs':>5}{'spill':>7}{'shared':>8}"
        f"{'16B ld':>8}{'16B st':>8}{'MB':>9}{'minimum':>9}{'ratio':>7}{'us at 3.35 TB/s':>17}  faults"
    ]
    for row in rows:
        code = row.code
        lines.append(
            f"{row.recipe:<10}{row.arch:<7}{row.operation:<21}{row.direction:<10}{code.registers:>5}"
            f"{code.spilled_bytes:>7}{code.shared_bytes:>8}{code.wide_loads:>8}{code.wide_stores:>8}"
            f"{row.device_bytes / 1e6:>9.1f}{row.minimum_bytes / 1e6:>9.1f}"
            f"{row.device_bytes / row.minimum_bytes:>7.3f}{row.microseconds:>17.1f}  {'; '.join(row.faults) or 'none'}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns 1 when a kernel spills, uses local memory, is not vectorised or moves too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_80,sm_90", help="comma-separated architectures (sm_80,sm_90)")
    parser.add_argument("--recipe", default="nepa_b,nepa_l,nepa_7b", help="comma-separated recipes whose shapes to use")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    recipes, archs = options.recipe.split(","), options.arch.split(",")
    for name in recipes:
        require(name in PRETRAINING_RECIPES, f"--recipe {name} is unknown; there are {', '.join(PRETRAINING_RECIPES)}.")
    for arch in archs:
        require(arch.removeprefix("sm_").isdigit(), f"--arch {arch} is not of the form sm_90.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces future defaults
        rows = build_report(recipes, archs)
    if options.json:
        print(json.dumps([asdict(row) | {"microseconds": row.microseconds, "faults": row.faults} for row in rows]))
    else:
        print(format_table(rows))
        print("Compiled and counted, not run: the times are bytes over H100 bandwidth, no measurement.")
    return int(any(row.faults for row in rows))
