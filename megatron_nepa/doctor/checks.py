"""All checks, as the command runs them."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from megatron_nepa.config import require
from megatron_nepa.doctor.report import Row, guarded, lines

if TYPE_CHECKING:
    import torch


def run_checks(groups: list[str], device: torch.device) -> Iterator[Row]:
    """The rows of some groups of checks; an error in one is a row and does not end the others."""
    for name in groups:
        yield from guarded(name, partial(GROUPS[name], device))


def _installation(device: torch.device) -> Iterator[Row]:
    # imported here and below: what is broken should fail one group, not the whole command
    from megatron_nepa.doctor.installation import check_installation

    return check_installation()


def _operations(device: torch.device) -> Iterator[Row]:
    from megatron_nepa.doctor.operations import check_operations

    return check_operations(device)


def _decoding(device: torch.device) -> Iterator[Row]:
    from megatron_nepa.doctor.decoding import check_decoding

    return check_decoding(device)


def _parallel(device: torch.device) -> Iterator[Row]:
    from megatron_nepa.doctor.parallel import check_parallel

    return check_parallel(device)


GROUPS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "installation": _installation,
    "operations": _operations,
    "decoding": _decoding,
    "parallel": _parallel,
}


def main(arguments: list[str] | None = None) -> int:
    """Check, print, and return 1 where something failed."""
    parser = argparse.ArgumentParser(description="What runs on this machine, and what to do about what does not.")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"comma-separated groups of {', '.join(GROUPS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    groups = options.only.split(",")
    require(
        all(name in GROUPS for name in groups),
        f"--only takes groups of {', '.join(GROUPS)} with commas between them, not {options.only!r}.",
    )
    import torch  # once the flags are known to be good: it takes seconds

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is defined: they are checked there
    rows = []
    for row in run_checks(groups, device):
        rows.append(row)
        if not options.json:
            print("\n".join(lines(row)), flush=True)
    counts = Counter(row.status for row in rows)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["failed"] > 0)
