"""Lists the images in Arrow and parquet files, as Hugging Face's ``datasets`` writes them.

The files stay as they are: an image is a range of bytes in one of them, read as a tar file's member is.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import extension_of
from megatron_nepa.data.index.label_values import number_classes, read_label
from megatron_nepa.data.index.table_columns import Columns, choose_columns
from megatron_nepa.data.index.table_files import TableSet
from megatron_nepa.data.index.table_values import Locator, open_table
from megatron_nepa.data.index.walk import is_image

if TYPE_CHECKING:
    import pyarrow as pa

_NO_IMAGE = "the row holds no image"
_FIRST_BYTES = 16  # enough to tell an image's format

Label = int | str | None


def list_tables(tables: TableSet) -> DatasetIndex:
    """The images of a set of tables, sizes not known yet (0).

    Args:
        tables: from :func:`~megatron_nepa.data.index.table_files.saved_tables` or ``loose_tables``.

    Raises:
        NotInPlaceError: images that are compressed.
        ConfigError: a damaged file, no images in it, or columns that do not tell what they are.
    """
    for name in tables.files:  # before the first is read to its end
        with open_table(tables.root / name) as table:
            table.locate(columns_of(tables, table.schema, name).image)
    found = _Found()
    for number, name in enumerate(tables.files):
        _read_table(tables, number, name, found)
    require(bool(found.names), f"{tables.root} holds no images: its tables have no rows.")
    columns = found.columns
    assert columns is not None
    labels, classes, notes = number_classes(
        found.labels, lambda i: f"row {i} of its tables", f"the tables of {tables.root}", columns.classes
    )
    unknown = np.zeros(len(found.names), np.int32)
    index = DatasetIndex(
        tables.root,
        PackedNames.pack(found.names),
        unknown,
        unknown,
        labels,
        classes,
        notes=(*tables.notes, *columns.notes, *notes),
    )
    index = _with_files(index, found) if all(found.paths) else _with_ranges(index, tables, found)
    if tables.rows is not None:
        inside = tables.rows < len(index)
        require(bool(inside.all()), f"{tables.root} chooses row {tables.rows.max()} of {len(index)}: save it again.")
        index = index.select(tables.rows)
    empty = np.zeros(len(index), bool) if not index.shards else index.size == 0
    if empty.any():
        quarantine = tuple((index.names[i], _NO_IMAGE) for i in np.flatnonzero(empty).tolist())
        require(not empty.all(), f"{tables.root} holds no images: all of its rows are empty.")
        index = replace(index.select(np.flatnonzero(~empty)), quarantine=quarantine)
    return index


def columns_of(tables: TableSet, schema: pa.Schema, name: str) -> Columns:
    """The columns of one of the tables that a run reads."""
    return choose_columns(schema, tables.features, str(tables.root / name))


def rows_of(tables: TableSet, name: str, start: int) -> Iterator[tuple[str, bytes, Label]]:
    """Name, encoded bytes (b"" where there are none) and label of every image of a table, from a row on."""
    with open_table(tables.root / name) as table:
        columns = columns_of(tables, table.schema, name)
        row = start
        for batch in table.batches(_read_columns(columns), start):
            values, paths = _values_and_paths(batch.column(columns.image))
            for content, path, label in zip(values, paths, _labels(batch, columns), strict=True):
                data = content.as_py() or b""
                yield _name(path, row, data), data, label
                row += 1


@dataclass
class _Found:
    """What the tables hold, row by row."""

    columns: Columns | None = None
    names: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    paths: list[str | None] = field(default_factory=list)  # of rows that hold a path alone
    shard: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    mask_offset: list[int] = field(default_factory=list)
    mask_size: list[int] = field(default_factory=list)


def _read_table(tables: TableSet, number: int, name: str, found: _Found) -> None:
    file = tables.root / name
    with open_table(file) as table, open(file, "rb", buffering=0) as raw:
        columns = columns_of(tables, table.schema, name)
        if found.columns is None:
            found.columns = columns
        require(
            replace(columns, notes=()) == replace(found.columns, notes=()),
            f"the tables of {tables.root} differ in their columns or classes, {tables.files[0]} and {name}: give the "
            "files of one set.",
        )
        locate = table.locate(columns.image)
        locate_mask = None if columns.mask is None else table.locate(columns.mask)
        row = 0
        for batch in table.batches(_read_columns(columns)):
            values, paths = _values_and_paths(batch.column(columns.image))
            offset, size = (part.tolist() for part in locate(values))
            for i, path in enumerate(paths):
                first = os.pread(raw.fileno(), _FIRST_BYTES, offset[i]) if size[i] else b""
                found.names.append(_name(path, row + i, first))
                found.paths.append(path if not size[i] else None)
            found.offset += offset
            found.size += size
            found.shard += [number] * len(size)
            found.labels += _labels(batch, columns)
            if locate_mask is not None:
                _add_masks(batch.column(columns.mask), locate_mask, found)
            row += batch.num_rows


def _add_masks(column: pa.Array, locate: Locator, found: _Found) -> None:
    offset, size = locate(_values_and_paths(column)[0])
    found.mask_offset += offset.tolist()
    found.mask_size += size.tolist()


def _with_ranges(index: DatasetIndex, tables: TableSet, found: _Found) -> DatasetIndex:
    lone = next((i for i, path in enumerate(found.paths) if path), None)
    require(
        lone is None,
        f"row {lone} of {tables.root} holds only a path ({found.paths[lone or 0]}) where others hold the image itself: "
        "save the set again with save_to_disk of a newer datasets, which puts every image in.",
    )
    index = replace(
        index,
        shards=tables.files,
        shard=np.array(found.shard, np.int32),
        offset=np.array(found.offset, np.int64),
        size=np.array(found.size, np.int64),
        notes=(*index.notes, f"its images are read where they lie, in {len(tables.files)} files"),
    )
    if not found.mask_offset:
        return index
    missing = next((i for i, size in enumerate(found.mask_size) if not size and found.size[i]), None)
    require(missing is None, f"row {missing} of {tables.root} holds an image without a mask: drop it.")
    return replace(
        index,
        masks=PackedNames.pack(f"mask of {name}" for name in found.names),
        mask_offset=np.array(found.mask_offset, np.int64),
        mask_size=np.array(found.mask_size, np.int64),
    )


def _with_files(index: DatasetIndex, found: _Found) -> DatasetIndex:
    """The images by their paths, where the tables hold nothing else."""
    paths = [path for path in found.paths if path]
    for path in paths:
        if "://" in path or not (index.root / path).is_file():
            raise ConfigError(
                f"{index.root} holds only the paths of its images, and there is no file {path}: save the set again "
                "where they are, with save_to_disk of a newer datasets, which puts every image in."
            )
    require(not found.mask_offset, f"{index.root} holds only the paths of its images: masks are read from tables only.")
    absolute = [os.path.abspath(index.root / path) for path in paths]
    common = Path(os.path.commonpath([os.path.dirname(path) for path in absolute]))
    names = PackedNames.pack(os.path.relpath(path, common) for path in absolute)
    note = "its tables hold only paths: the images are read from there"
    return replace(index, root=common, names=names, notes=(*index.notes, note))


def _read_columns(columns: Columns) -> list[str]:
    return [name for name in (columns.image, columns.mask, columns.label) if name is not None]


def _values_and_paths(column: pa.Array) -> tuple[pa.Array, list[str | None]]:
    """The bytes of a column of images, and the paths beside them where there are any."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column, [None] * len(column)
    values = column.field("bytes")
    if column.type.get_field_index("path") < 0:
        return values, [None] * len(values)
    # the parts of a struct that is itself missing say nothing
    given = zip(column.field("path").to_pylist(), column.is_valid().to_pylist(), strict=True)
    return values, [path if valid else None for path, valid in given]


def _labels(batch: pa.RecordBatch, columns: Columns) -> list[Label]:
    if columns.label is None:
        return [None] * batch.num_rows
    values = batch.column(columns.label).to_pylist()
    where = f"column {columns.label}"
    # -1 is what a ClassLabel holds of an unlabelled test set
    return [
        None if value is None or value == -1 else read_label(str(value), where) if str(value).strip() else None
        for value in values
    ]


def _name(path: str | None, row: int, first: bytes) -> str:
    """A file name for the image of a row: its own, or the row's number."""
    base = posixpath.basename(path.replace("\\", "/")) if path else ""
    if base and is_image(base):
        return base
    return f"{base or f'row_{row:08d}'}{extension_of(first)}"
