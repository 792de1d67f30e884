"""A few rows at a time: as many as a CPU's cache keeps from one pass to the next."""

from __future__ import annotations

from collections.abc import Iterator


def cached_parts(rows: int, row_bytes: int, cached_bytes: int) -> Iterator[slice]:
    """Slices that together are all ``rows``, of as many as fit into ``cached_bytes``, at least one."""
    at_once = max(1, cached_bytes // max(1, row_bytes))
    for start in range(0, rows, at_once):
        yield slice(start, start + at_once)
