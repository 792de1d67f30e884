"""Rows of the doctor's report."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: what was checked.
        status: ok; failed; absent, of an optional part that is not installed; not checked, of what this machine
            cannot run.
        found: what was seen, or why nothing could be.
        remedy: what mends it; empty unless failed.
    """

    name: str
    status: Literal["ok", "failed", "absent", "not checked"]
    found: str
    remedy: str = ""


Check = Callable[[], Iterable[Row]]


def guarded(name: str, check: Check) -> Iterator[Row]:
    """The rows of ``check``, and one that failed in place of an error that ends it."""
    try:
        yield from check()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        remedy = "mend what the error names; rows above that failed may be its cause."
        yield Row(name, "failed", f"{type(error).__name__}: {reason}", remedy)


def lines(row: Row) -> Iterator[str]:
    """The row as text."""
    head = f"{row.status:<12}{row.name:<34}"
    yield from textwrap.wrap(head + row.found, WIDTH, subsequent_indent=" " * len(head), drop_whitespace=True)
    if row.remedy:
        yield from textwrap.wrap("-> " + row.remedy, WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 15)
