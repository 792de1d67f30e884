"""A part in a process of its own, so that whatever ends it ends it alone.

It writes a line of JSON for each event to the file descriptor that it is given: the checks it has, a check that
begins, one that is over. It ends itself where its parent is gone, which its standard input shows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_nepa.acceptance.check import perform
from megatron_nepa.acceptance.report import Entry

SPOILT = 75  # exit status of a process in which CUDA has failed: the rest takes a new one


def main(arguments: list[str] | None = None) -> int:
    """Run the checks of a part that are not done; 75 where a new process should go on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--done", type=json.loads, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rehearsal", action="store_true")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    os.set_inheritable(options.events, False)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(**event: Any) -> None:
        os.write(options.events, (json.dumps(event) + "\n").encode())

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is defined: they are judged there
    from megatron_nepa.acceptance.parts import PARTS
    from megatron_nepa.acceptance.setting import setting

    here = setting(options.work, options.rehearsal)
    checks = PARTS[options.part].load()(here)
    tell(checks=[[check.name, check.seconds] for check in checks])
    for check in checks:
        if check.name in options.done or deadline - time.monotonic() < check.seconds:
            continue
        tell(begin=check.name)
        start = time.monotonic()
        rows, spoilt = perform(check, here.calls.is_gpu)
        entry = Entry(options.part, check.name, time.monotonic() - start, True, tuple(rows))
        tell(entry=asdict(entry))
        if spoilt:
            return SPOILT
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())  # libraries that wait for a device at the end would wait here
