"""Lists the images in Arrow and parquet files, as Hugging Face's ``datasets`` writes them.

The files stay as they are: an image is a range of bytes in one of them, read as a tar file's member is.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import extension_of
from megatron_nepa.data.index.label_values import Label, Tally, number_classes, read_label
from megatron_nepa.data.index.listing import Facts, Known, Listed, Numbering, Source, kinds_of
from megatron_nepa.data.index.storage import shard_stamp
from megatron_nepa.data.index.table_columns import Columns, choose_columns
from megatron_nepa.data.index.table_files import TableSet
from megatron_nepa.data.index.table_values import Locator, open_table
from megatron_nepa.data.index.walk import is_image

if TYPE_CHECKING:
    import pyarrow as pa

_NO_IMAGE = "the row holds no image"
_FIRST_BYTES = 16  # enough to tell an image's format
_IN_PLACE = "its images are read where they lie, in {} files"


def table_source(tables: TableSet) -> Source:
    """The images of a set of tables.

    Args:
        tables: from :func:`~megatron_nepa.data.index.table_files.saved_tables` or ``loose_tables``.

    Raises:
        NotInPlaceError: images that are compressed.
        ConfigError: a damaged file, no images in it, or columns that do not tell what they are.
    """
    columns = None
    for name in tables.files:  # before the first is read to its end
        with open_table(tables.root / name) as table:
            found = columns_of(tables, table.schema, name)
            table.locate(found.image)
        columns = columns or found
        require(
            replace(found, notes=()) == replace(columns, notes=()),
            f"the tables of {tables.root} differ in their columns or classes, {tables.files[0]} and {name}: give the "
            "files of one set.",
        )
    assert columns is not None
    if tables.rows is not None or _holds_paths(tables, columns):
        return Known(_list_at_once(tables, columns))
    return TableSource(tables, columns)


class TableSource(Source):
    """Images that lie in tables, listed file by file.

    Args:
        tables: the files.
        columns: of every one of them.
    """

    unit = "files"

    def __init__(self, tables: TableSet, columns: Columns) -> None:
        self.root, self.units, self._tables, self._columns = tables.root, tables.files, tables, columns
        self.has_masks = columns.mask is not None

    def list(self, number: int) -> Listed:
        """The images of one file."""
        name = self.units[number]
        stamp, found = shard_stamp(self.root / name), _Found()
        _read_table(self._tables, number, name, self._columns, found)
        kind, kinds = kinds_of(((label,) for label in found.labels), str)
        index = _with_ranges(_plain(self._tables, found, kind), name, found)
        index = replace(index, shards=(name,), stamps=(stamp,), shard=np.zeros(len(kind), np.int32))
        empty = len(kind) - int(np.count_nonzero(index.size))
        return Listed(_without_empty(index), Facts(len(kind), kinds, counters={"empty": empty}))

    def number(self, facts: Iterable[Facts]) -> Numbering:
        """Classes are the labels."""
        tally, rows, empty = Tally(), 0, 0
        for unit in facts:
            for kind in unit.kinds or ():
                tally.add(kind.what[0], f"row {rows + int(kind.first)} of its tables", kind.images)
            rows, empty = rows + unit.images, empty + unit.counters["empty"]
        require(rows > 0, f"{self.root} holds no images: its tables have no rows.")
        require(rows > empty, f"{self.root} holds no images: all of its rows are empty.")
        numbers, classes, notes = number_classes(tally, f"the tables of {self.root}", self._columns.classes)
        told = (*self._tables.notes, *self._columns.notes, *notes, _IN_PLACE.format(len(self.units)))
        return Numbering(classes, told, lambda what: numbers[what[0]])


def _list_at_once(tables: TableSet, columns: Columns) -> DatasetIndex:
    """The images of tables of which some rows are chosen, or which hold only paths."""
    found = _Found()
    for number, name in enumerate(tables.files):
        _read_table(tables, number, name, columns, found)
    require(bool(found.names), f"{tables.root} holds no images: its tables have no rows.")
    tally = Tally()
    for i, label in enumerate(found.labels):
        tally.add(label, f"row {i} of its tables")
    numbers, classes, notes = number_classes(tally, f"the tables of {tables.root}", columns.classes)
    index = _plain(tables, found, np.array([numbers[label] for label in found.labels], np.int32))
    index = replace(index, classes=classes, notes=(*tables.notes, *columns.notes, *notes))
    if all(found.paths):
        index = _with_files(index, found)
    else:
        index = replace(_with_ranges(index, "", found), shards=tables.files, shard=np.array(found.shard, np.int32))
        index = replace(index, notes=(*index.notes, _IN_PLACE.format(len(tables.files))))
    if tables.rows is not None:
        inside = tables.rows < len(index)
        require(bool(inside.all()), f"{tables.root} chooses row {tables.rows.max()} of {len(index)}: save it again.")
        index = index.select(tables.rows)
    index = _without_empty(index)
    require(len(index) > 0, f"{tables.root} holds no images: all of its rows are empty.")
    return index


def _plain(tables: TableSet, found: _Found, label: npt.NDArray[np.int32]) -> DatasetIndex:
    """The rows without what tells where their bytes lie."""
    unknown = np.zeros(len(found.names), np.int32)
    return DatasetIndex(tables.root, PackedNames.pack(found.names), unknown, unknown, label)


def _without_empty(index: DatasetIndex) -> DatasetIndex:
    """The rows that hold an image; the others are in ``quarantine``."""
    empty = np.flatnonzero(index.size == 0) if index.shards else np.zeros(0, np.int64)
    if not len(empty):
        return index
    quarantine = tuple((index.names[i], _NO_IMAGE) for i in empty.tolist())
    return replace(index.select(np.flatnonzero(index.size)), quarantine=quarantine)


def _holds_paths(tables: TableSet, columns: Columns) -> bool:
    """Whether the first row that holds anything holds a path alone."""
    for name in tables.files:
        with open_table(tables.root / name) as table:
            for batch in table.batches([columns.image]):
                values, paths = _values_and_paths(batch.column(columns.image))
                for value, path in zip(values, paths, strict=True):
                    if path or value.as_py():
                        return not value.as_py()
    return False


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

    names: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    paths: list[str | None] = field(default_factory=list)  # of rows that hold a path alone
    shard: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    mask_offset: list[int] = field(default_factory=list)
    mask_size: list[int] = field(default_factory=list)


def _read_table(tables: TableSet, number: int, name: str, columns: Columns, found: _Found) -> None:
    file = tables.root / name
    with open_table(file) as table, open(file, "rb", buffering=0) as raw:
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


def _with_ranges(index: DatasetIndex, name: str, found: _Found) -> DatasetIndex:
    """The rows, and where their bytes lie in the file ``name`` below the index's root; "" stands for several."""
    lone = next((i for i, path in enumerate(found.paths) if path), None)
    require(
        lone is None,
        f"row {lone} of {index.root / name} holds only a path ({found.paths[lone or 0 :][:1]}) where others "
        "hold the image itself: save the set again with save_to_disk of a newer datasets, which puts every image in.",
    )
    index = replace(index, offset=np.array(found.offset, np.int64), size=np.array(found.size, np.int64))
    if not found.mask_offset:
        return index
    missing = next((i for i, size in enumerate(found.mask_size) if not size and found.size[i]), None)
    require(missing is None, f"row {missing} of {index.root / name} holds an image without a mask: drop it.")
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
        if "://" in path or not (index.folder / path).is_file():
            raise ConfigError(
                f"{index.root} holds only the paths of its images, and there is no file {path}: save the set again "
                "where they are, with save_to_disk of a newer datasets, which puts every image in."
            )
    require(not found.mask_offset, f"{index.root} holds only the paths of its images: masks are read from tables only.")
    absolute = [os.path.abspath(index.folder / path) for path in paths]
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
    # -1 is what a ClassLabel holds of an unlabelled test set, nan what pandas makes of a missing number
    missing = [value is None or value in (-1, "") or value != value for value in values]
    return [
        None if absent or not str(value).strip() else read_label(str(value), where)
        for value, absent in zip(values, missing, strict=True)
    ]


def _name(path: str | None, row: int, first: bytes) -> str:
    """A file name for the image of a row: its own, or the row's number."""
    base = posixpath.basename(path.replace("\\", "/")) if path else ""
    if base and is_image(base):
        return base
    return f"{base or f'row_{row:08d}'}{extension_of(first)}"
