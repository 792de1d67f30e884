"""Compile every Triton kernel without a GPU and report registers, spills, vector access and bytes.

    python tools/kernel_report.py --arch sm_80,sm_90 [--recipe nepa_b,nepa_l,nepa_7b] [--json]

Exits with 1 when a kernel does not compile, spills, touches local memory, is not vectorised or moves more bytes than it
should.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict

from megatron_nepa.config import require
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.terminal import tool


def main(arguments: list[str]) -> int:
    """Print the report; returns 1 when a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80,sm_90", help="comma-separated architectures (sm_80,sm_90)")
    parser.add_argument("--recipe", default="nepa_b,nepa_l,nepa_7b", help="comma-separated recipes whose shapes to use")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    recipes, archs = options.recipe.split(","), options.arch.split(",")
    for name in recipes:
        require(name in PRETRAINING_RECIPES, f"--recipe {name} is unknown; there are {', '.join(PRETRAINING_RECIPES)}.")
    for arch in archs:
        require(arch.removeprefix("sm_").isdigit(), f"--arch {arch} is not of the form sm_90.")

    from megatron_nepa.kernels.proofs import report  # once the flags are known to be good: it brings torch and Triton

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces future defaults
        rows = report.build_report(recipes, archs)
    if options.json:
        print(json.dumps([asdict(row) | {"microseconds": row.microseconds, "faults": row.faults} for row in rows]))
    else:
        print(report.format_table(rows))
        print("Compiled and counted, not run: the times are bytes over H100 bandwidth, no measurement.")
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    with tool("kernel_report"):
        raise SystemExit(main(sys.argv[1:]))
