"""Runs parts one after the other, each in processes of its own and within its time, and keeps the report."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nepa.acceptance.parts import PARTS, Part
from megatron_nepa.acceptance.process import SPOILT
from megatron_nepa.acceptance.report import Entry, Report, Row

START_SECONDS = 120  # for the imports of a part, from a slow file system
ROOT = Path(__file__).parents[2]
TIME_REMEDY = "the same command goes on with it; --patience 2 gives every part twice the time."
Say = Callable[[str], None]


@dataclass(frozen=True)
class Runner:
    """Who runs the parts.

    Attributes:
        report: that is kept.
        work: folder of runs and logs.
        patience: factor on all times.
        say: shows progress.
        command: that starts a part's process; its arguments follow.
    """

    report: Report
    work: Path
    patience: float = 1.0
    say: Say = print
    command: tuple[str, ...] = (sys.executable, "-m", "megatron_nepa.acceptance.process")

    def run(self, number: str) -> None:
        """Run the checks of a part that the report lacks; whatever happens to them is in the report."""
        part, report = PARTS[number], self.report
        report.forget([number], final=False)
        deadline = time.monotonic() + part.seconds * self.patience
        self.say(f"part {number}, {part.title}: at most {part.seconds * self.patience / 60:.1f} minutes")
        known: dict[str, float] = {}
        while self._attempt(number, deadline, known):
            pass
        for name in known:
            if name not in report.done(number):
                row = Row(name, "NOT RUN", "the part's time was over", "", TIME_REMEDY)
                self._keep(Entry(number, name, 0.0, False, (row,)))

    def _attempt(self, number: str, deadline: float, known: dict[str, float]) -> bool:
        """One process; True where another one should go on behind a check that ended it."""
        process = _Process(self._arguments(number, deadline - time.monotonic()), self.work / f"part{number}.log")
        current, began = "", time.monotonic()
        process.limit = min(began + START_SECONDS * self.patience, deadline)
        try:
            for event in process.events():
                if "checks" in event:
                    known |= {name: seconds * self.patience for name, seconds in event["checks"]}
                    process.limit = deadline
                elif "begin" in event:
                    current, began = event["begin"], time.monotonic()
                    process.limit = min(began + known[current], deadline)
                    self.say(f"  {current} ...")
                else:
                    entry = event["entry"]
                    rows = tuple(Row(**row) for row in entry["rows"])
                    self._keep(Entry(number, entry["check"], entry["seconds"], True, rows))
                    current, process.limit = "", deadline
            status = process.end()
        finally:
            process.kill()
        if status == 0 or (status is None and not current and known):
            return False
        if current or not known:
            row = self._ended(current or "start of the part", status, time.monotonic() - began, process.last_line())
            self._keep(Entry(number, current or "start", time.monotonic() - began, bool(current), (row,)))
        return bool(current or status == SPOILT) and time.monotonic() < deadline

    def _arguments(self, number: str, seconds: float) -> list[str]:
        arguments = [*self.command, number, "--work", str(self.work), "--seconds", f"{seconds:.1f}"]
        arguments += ["--done", json.dumps(self.report.done(number))]
        return arguments + (["--rehearsal"] if self.report.rehearsal else [])

    def _keep(self, entry: Entry) -> None:
        self.report.add(entry)
        for row in entry.rows:
            remedy = f" -> {row.remedy}" if row.status == "FAIL" and row.remedy else ""
            self.say(f"  {row.status:<8}{row.name}: {row.figure}{remedy}")

    def _ended(self, name: str, status: int | None, seconds: float, last_line: str) -> Row:
        if status is None:
            remedy = "see where it waits: its log lies beside the report; --patience 2 if it is only slow."
            return Row(name, "FAIL", f"not over after {seconds:.0f} s", "it hangs or is far too slow", remedy)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        remedy = "its log lies beside the report."
        return Row(name, "FAIL", f"its process ended {how}: {last_line}", "it took its process with it", remedy)


class _Process:
    """A part's process, whose events are read as they come.

    Args:
        arguments: that start it.
        log: that its output is appended to.

    Attributes:
        limit: time (``time.monotonic``) until which events are waited for; each event may move it.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log, self.limit, self._closed = log, 0.0, False
        self._read, write = os.pipe()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [*arguments, "--events", str(write)],
                stdin=subprocess.PIPE,  # closes when this process is gone
                stdout=output,
                stderr=output,
                pass_fds=(write,),
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        os.close(write)

    def events(self) -> Iterator[dict[str, Any]]:
        """Until the process closes its end or the limit is over."""
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while selector.select(max(0.0, self.limit - time.monotonic())):
                data = os.read(self._read, 2**16)
                if not data:
                    self._closed = True
                    return
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)

    def end(self) -> int | None:
        """Its exit status; None where it goes on."""
        try:
            return self._process.wait(timeout=30.0 if self._closed else 0.1)  # one that crashed may write its core
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it with everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._read)

    def last_line(self) -> str:
        """Of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a word"


def numbers(only: str | None) -> list[str]:
    """Numbers of the parts in ``--only``, or of all."""
    from megatron_nepa.config import require

    chosen = list(PARTS) if only is None else [number.strip() for number in only.split(",")]
    for number in chosen:
        require(number in PARTS, f"--only {number} is unknown; parts are {', '.join(PARTS)}.")
    return sorted(set(chosen))


def titles() -> dict[str, str]:
    """Of the parts, by number."""
    return {number: _titled(part) for number, part in PARTS.items()}


def _titled(part: Part) -> str:
    return f"{part.title} (at most {part.seconds / 60:g} minutes)"
