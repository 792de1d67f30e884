"""The study's memory: every number that a run of it logged, in one file that is kept between days and machines."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from examples.ablations.cells import Cell, Pretraining
from megatron_nepa.config import ConfigError
from megatron_nepa.files import replace_text

Record = dict[str, Any]


class Results:
    """What has been trained so far.

    Args:
        path: of the file, which need not exist.

    Raises:
        ConfigError: for a file that is not one of results.

    Attributes:
        plan: the steps of all cells and why, once the noise is known.
        pretrainings: by key: flags, final loss and health, curves, FLOPs, seconds, machine, date.
        cells: by key: accuracy, seconds, machine, date.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content: Record = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
                content["pretrainings"], content["cells"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} holds no results of the study ({error!r}): move it away.") from None
        self.plan: Record | None = content.get("plan")
        self.pretrainings: dict[str, Record] = content.get("pretrainings", {})
        self.cells: dict[str, Record] = content.get("cells", {})

    def accuracy(self, cell: Cell) -> float | None:
        """Share of photographs classified right; None of a cell that is missing or whose training failed."""
        record = self.cells.get(cell.key)
        return None if record is None else record["accuracy"]

    def pretraining(self, start: Pretraining) -> Record:
        """The record of a pre-training that was made."""
        return self.pretrainings[start.key]

    def add(self, pretraining: tuple[str, Record] | None, cells: dict[str, Record]) -> None:
        """Keep what a task measured; the file is replaced in one piece."""
        if pretraining is not None:
            self.pretrainings[pretraining[0]] = pretraining[1]
        self.cells.update(cells)
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"plan": self.plan, "pretrainings": self.pretrainings, "cells": self.cells}
        replace_text(self.path, json.dumps(content, indent=1) + "\n")

    def cost(self) -> tuple[float, list[str], list[str]]:
        """Core-hours of all trainings, and the machines and days that they ran on."""
        records = [*self.pretrainings.values(), *self.cells.values()]
        seconds = sum(record["seconds"] for record in records)
        return seconds / 3600, sorted({r["machine"] for r in records}), sorted({r["date"] for r in records})


def today() -> str:
    """The date, as results name it."""
    return datetime.date.today().isoformat()
