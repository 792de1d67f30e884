"""Reading a run's metrics.jsonl, and cutting it back where a checkpoint is continued."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from megatron_nepa.files import replace_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, oldest first; lines that were written only in part are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Cut a metrics.jsonl back to a checkpoint, so that the run that continues it writes every step once.

    The rows after ``step`` move to metrics.replaced.jsonl beside it, appended to what is there. The file is replaced
    in one piece. Nothing happens where there is no file.

    Args:
        path: the metrics.jsonl.
        step: last step to keep.
    """
    if not path.exists():
        return
    rows = read_metrics(path)
    kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
    removed = [json.dumps(row) + "\n" for row in rows if row["step"] > step]
    if removed:
        with path.with_name("metrics.replaced.jsonl").open("a") as file:
            file.writelines(removed)
    replace_text(path, "".join(kept))
