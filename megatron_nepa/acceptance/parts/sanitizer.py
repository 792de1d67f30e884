"""Part 6: the kernels' reads and writes, watched by compute-sanitizer at small shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from megatron_nepa.acceptance.check import Check, NotRun
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.setting import Setting
from megatron_nepa.kernels.operations import OPERATIONS

SECONDS = 45.0
# odd sizes, where a mask that is wrong reads beside its tensor
PROGRAM = """
import sys
import torch
from megatron_nepa.benchmarks.contenders import contests
from megatron_nepa.config import ModelConfig
from megatron_nepa.doctor.operations import excess
from megatron_nepa.kernels.operations import OPERATIONS
device = torch.device(sys.argv[1])
model = ModelConfig(image_size=70, hidden_size=96, num_heads=3, num_layers=1, mlp_hidden_size=72, bos_token=True)
fused = next(each.fused for each in OPERATIONS if each.name == sys.argv[2])()
contest = next(each for each in contests(model, 2, device, torch.bfloat16) if each.name == sys.argv[2])
print(excess(contest, fused))
"""


def checks(setting: Setting) -> list[Check]:
    """A check an operation."""
    return [
        Check(f"memcheck of {operation.name}", SECONDS, partial(memcheck, setting, operation.name))
        for operation in OPERATIONS
    ]


def memcheck(setting: Setting, operation: str) -> Iterator[Row]:
    """Forward and backward under the sanitizer, in a process of its own."""
    sanitizer = setting.calls.sanitizer()
    if sanitizer is None:
        raise NotRun("compute-sanitizer is not installed", "it comes with the CUDA toolkit; put its bin on the PATH.")
    command = [*sanitizer, sys.executable, "-c", PROGRAM, setting.calls.device.type, operation]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    output = found.stdout + found.stderr
    print(output)  # into the part's log
    summary = next((line.strip("= ") for line in output.splitlines() if "ERROR SUMMARY" in line), "")
    name = f"memcheck of {operation}"
    if found.returncode == 0:
        yield Row(name, "PASS", summary or "ran to its end", "no read or write beside a tensor")
    elif summary and "ERROR SUMMARY: 0" not in summary:
        remedy = "set --kernels reference; the part's log names the line and the address."
        yield Row(name, "FAIL", summary, "the kernel reads or writes beside its tensors", remedy)
    else:
        raise RuntimeError((output.strip().splitlines() or [f"status {found.returncode}"])[-1])
