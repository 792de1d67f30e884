"""Unpacks the images of Arrow and parquet files into tar shards, for those that are compressed where they lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.headers import UnreadableImageError, image_size
from megatron_nepa.data.index.table_files import TableSet
from megatron_nepa.data.index.table_values import open_table
from megatron_nepa.data.index.tables import columns_of, rows_of
from megatron_nepa.data.index.tar_members import sample_key
from megatron_nepa.data.indexing.lock import claimed
from megatron_nepa.data.indexing.write_shards import (
    FACTS_FILE,
    check_sizes,
    in_threads,
    missing_shards,
    scaled,
    write_classes,
    write_shard,
)


def unpack_tables(
    tables: TableSet,
    folder: str | Path,
    shard_size: int,
    shorter_side: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write the images of tables, in their order, into ``folder``/shard_000000.tar, shard_000001.tar, ...

    As :func:`~megatron_nepa.data.indexing.write_shards.write_shards` does from an index: a shard that is already there
    is kept, so the same call continues after an interruption. A worker holds the rows of one row group at a time. Rows
    without an image are passed over; what is no image is kept as it is, for the index of the shards to leave out.

    Args:
        tables: what to unpack.
        folder: where the shards go; made if missing.
        shard_size: rows of a shard.
        shorter_side: scale images down to this shorter side, as ``write_shards`` does; None keeps their bytes.
        workers: threads; None takes one a core.
        progress: show a progress bar.

    Raises:
        ConfigError: a shard size or shorter side below 1, tables of image and mask pairs, a folder of other shards or
            that another process is writing, or a table that cannot be read.
    """
    check_sizes(shard_size, shorter_side)
    require(tables.rows is None, f"{tables.root} chooses some rows of compressed tables: save the set again.")
    ends, classes = _survey(tables)
    target = Path(folder)
    facts = {
        "tables": [[name, (tables.root / name).stat().st_size] for name in tables.files],
        "shard_size": shard_size,
        "shorter_side": shorter_side,
    }
    mismatch = f"{target} holds shards of other images or another size: remove them, or choose another folder."
    with claimed(target / FACTS_FILE, facts, mismatch):
        write_classes(target, classes)
        count = int(ends[-1])
        missing = missing_shards(target, count, shard_size)
        done = count - sum(len(rows) for rows, _ in missing)
        with tqdm(total=count, initial=done, unit=" images", disable=not progress) as bar:

            def write(rows: range, path: Path) -> None:
                content = _rows(tables, ends, rows.start, rows.stop)
                write_shard(path, _members(content, rows.start, shorter_side, bar.update))

            in_threads(write, missing, workers or os.cpu_count() or 1)


def _survey(tables: TableSet) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """The row at which each file ends, counted through all of them, and the class names."""
    rows, classes = [], set()
    for name in tables.files:
        with open_table(tables.root / name) as table:
            columns = columns_of(tables, table.schema, name)
            if columns.mask is not None:
                raise ConfigError(
                    f"{tables.root} holds compressed image and mask pairs, and shards hold images and labels only: "
                    "save the set with save_to_disk, which compresses nothing."
                )
            rows.append(table.num_rows())
            classes.add(columns.classes or ())
    require(len(classes) == 1, f"the tables of {tables.root} name different classes: give the files of one set.")
    require(sum(rows) > 0, f"{tables.root} holds no images: its tables have no rows.")
    return np.cumsum(rows), classes.pop()


def _rows(
    tables: TableSet, ends: npt.NDArray[np.int64], start: int, stop: int
) -> Iterator[tuple[str, bytes, int | str | None]]:
    """Name, bytes and label of the rows from ``start`` to ``stop``, counted through all files."""
    row = start
    while row < stop:
        number = int(np.searchsorted(ends, row, side="right"))
        first = int(ends[number - 1]) if number else 0
        for image in rows_of(tables, tables.files[number], row - first):
            yield image
            row += 1
            if row == stop:
                break


def _members(
    rows: Iterator[tuple[str, bytes, int | str | None]],
    start: int,
    shorter_side: int | None,
    advance: Callable[[int], object],
) -> Iterator[tuple[str, bytes]]:
    taken: set[str] = set()
    for row, (name, data, label) in enumerate(rows, start):
        advance(1)
        if not data:
            continue
        stem, extension = os.path.splitext(name)
        if shorter_side is not None and _exceeds(data, shorter_side):
            data, extension = scaled(data, shorter_side), ".jpg"
        if sample_key(name)[0] in taken or not sample_key(name)[0]:
            stem = f"{stem.replace('.', '_')}_{row:08d}"
        key = sample_key(stem + extension)[0]
        taken.add(key)
        yield stem + (extension or ".jpg"), data
        if label is not None:
            yield f"{key}.cls", str(label).encode()


def _exceeds(data: bytes, shorter_side: int) -> bool:
    """Whether an image is to be scaled down; not where it cannot be read, which the index of the shards finds out."""
    try:
        return min(image_size(data)) > shorter_side
    except UnreadableImageError:
        return False
