"""The report: rows, kept after every check as JSON, which is also what a run continues from, and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.config import ConfigError, require
from megatron_nepa.files import replace_text

Status = Literal["PASS", "FAIL", "NOT RUN"]
REHEARSAL = "**A rehearsal on a CPU through a stand-in for CUDA: it shows that the tool works, and nothing of a GPU.**"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: PASS; FAIL, also of what is right and slow; NOT RUN, of what this machine cannot run or had no time for.
        figure: what was measured, or why nothing could be.
        meaning: what follows from it.
        remedy: what to do; empty where there is nothing to do.
        results: figures by entry of the results page (:data:`megatron_nepa.benchmarks.suite.ENTRIES`).
    """

    name: str
    status: Status
    figure: str
    meaning: str = ""
    remedy: str = ""
    results: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A check that is over.

    Attributes:
        part: number of its part.
        check: its name.
        seconds: that it took.
        final: False where another run should do it again: it had no time, or its part did not start.
        rows: what it found.
    """

    part: str
    check: str
    seconds: float
    final: bool
    rows: tuple[Row, ...]


class Report:
    """The entries of one machine in one folder.

    Args:
        folder: that holds ``acceptance.json`` and ``acceptance.md``; made where it is missing.
        machine: this one.
        rehearsal: whether a stand-in takes the GPU's place.
        titles: of the parts, by number.

    Raises:
        ConfigError: the folder's report is no report, or that of another machine, or cannot be written.
    """

    def __init__(self, folder: Path, machine: Machine, rehearsal: bool, titles: dict[str, str]) -> None:
        self.json_path, self.markdown_path = folder / "acceptance.json", folder / "acceptance.md"
        self.machine, self.rehearsal, self.titles = machine, rehearsal, titles
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._entries = self._read() if self.json_path.is_file() else {}
            self.write()
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): give another --output_dir.") from None

    def entries(self) -> list[Entry]:
        """All, in the order of the parts."""
        order = list(self.titles)
        return sorted(self._entries.values(), key=lambda entry: order.index(entry.part))

    def done(self, part: str) -> list[str]:
        """Names of a part's checks that need not run again."""
        return [entry.check for entry in self._entries.values() if entry.part == part and entry.final]

    def add(self, entry: Entry) -> None:
        """Keep an entry in the place of an earlier one of its check, on the disk as well."""
        self._entries[entry.part, entry.check] = entry
        self.write()

    def forget(self, parts: list[str], final: bool = True) -> None:
        """Drop the entries of some parts, all or only those that are not final."""
        kept = {
            key: entry for key, entry in self._entries.items() if entry.part not in parts or (entry.final and not final)
        }
        self._entries = kept
        self.write()

    def counts(self) -> Counter[Status]:
        """Rows by status."""
        return Counter(row.status for entry in self._entries.values() for row in entry.rows)

    def write(self) -> None:
        """Write both files, each whole or not at all."""
        state = {
            "machine": asdict(self.machine),
            "rehearsal": self.rehearsal,
            "entries": [asdict(entry) for entry in self.entries()],
        }
        replace_text(self.json_path, json.dumps(state, indent=2) + "\n")
        replace_text(self.markdown_path, self.markdown())

    def markdown(self) -> str:
        """The table of all rows, headed by where and with what they were found."""
        machine = self.machine
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.counts().items())) or "nothing yet"
        lines = ["# Acceptance", ""]
        lines += [REHEARSAL, ""] if self.rehearsal else []
        lines += [
            f"{machine.device}, {machine.threads} threads; megatron_nepa {machine.project_version}, torch "
            f"{machine.torch_version}; {machine.date}. {counts}.",
            "",
            "| part | what | verdict | figure | what it means | what to do |",
            "|---|---|---|---|---|---|",
        ]
        for entry in self.entries():
            for row in entry.rows:
                cells = (row.name, f"**{row.status}**", row.figure, row.meaning, row.remedy)
                lines.append(" | ".join((f"| {entry.part}", *map(_cell, cells))) + " |")
        lines += ["", *(f"{number}. {title}" for number, title in self.titles.items())]
        return "\n".join(lines) + "\n"

    def _read(self) -> dict[tuple[str, str], Entry]:
        try:
            state: dict[str, Any] = json.loads(self.json_path.read_text())
            machine, rehearsal = Machine(**state["machine"]), bool(state["rehearsal"])
            entries = [
                Entry(**(entry | {"rows": tuple(Row(**row) for row in entry["rows"])})) for entry in state["entries"]
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{self.json_path} is no report ({error}): remove it.") from None
        here, there = ((each.device, each.torch_version, each.project_version) for each in (self.machine, machine))
        require(
            here == there and rehearsal == self.rehearsal,
            f"{self.json_path} is the report of {'a rehearsal on ' if rehearsal else ''}{', '.join(there)} "
            f"(device, torch, megatron_nepa), and this is {'a rehearsal on ' if self.rehearsal else ''}"
            f"{', '.join(here)}: give another --output_dir.",
        )
        self.machine = machine  # whose date is the first day's
        return {(entry.part, entry.check): entry for entry in entries if entry.part in self.titles}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
