"""The kernel report: what every kernel compiles to and how many bytes it moves, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

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
    # None where it does not compile; ``error`` says why
    code: MachineCode | None
    device_bytes: int
    minimum_bytes: int
    error: str = ""

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
        if code is None:
            return [f"does not compile: {self.error}"]
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
            for arch in archs:
                code, error = _compiled(launch, arch)
                rows.append(Row(name, arch, operation, direction, code, moved, minimum, error))
    return rows


def _compiled(launch: Launch, arch: str) -> tuple[MachineCode | None, str]:
    """The machine code, or why there is none: one kernel that fails leaves the others' rows."""
    try:
        return compile_launch(launch, arch), ""
    except Exception as error:  # of Triton's parts, ptxas and cuobjdump, which have no base class in common
        lines = str(error).strip().splitlines()
        return None, lines[-1].strip() if lines else type(error).__name__


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
        lines.append(
            f"{row.recipe:<10}{row.arch:<7}{row.operation:<21}{row.direction:<10}{_code_columns(row.code)}"
            f"{row.device_bytes / 1e6:>9.1f}{row.minimum_bytes / 1e6:>9.1f}"
            f"{row.device_bytes / row.minimum_bytes:>7.3f}{row.microseconds:>17.1f}  {'; '.join(row.faults) or 'none'}"
        )
    return "\n".join(lines)


def _code_columns(code: MachineCode | None) -> str:
    if code is None:
        return f"{'-':>5}{'-':>7}{'-':>8}{'-':>8}{'-':>8}"
    return f"{code.registers:>5}{code.spilled_bytes:>7}{code.shared_bytes:>8}{code.wide_loads:>8}{code.wide_stores:>8}"
