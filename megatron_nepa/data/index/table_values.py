"""Opens Arrow streams and parquet files, and tells where in the file each of their values lies.

Values that lie in the file as they are, uncompressed and in one piece, are read there by number as a tar file's members
are. An Arrow stream is mapped into memory, and the address of a value tells its place. A parquet file does not tell:
each value is looked for behind the one before, and found only where its very bytes stand.
"""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 64  # rows that are held at a time: images of 10 MB stay below a gigabyte
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

Ranges = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # offsets in the file, sizes


class NotInPlaceError(ConfigError):
    """Images that cannot be read where they lie, in a sentence that says what to do."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(
            f"the images in {file} {reason}, so they cannot be read where they lie: give --to_shards DIR, which "
            "unpacks them once."
        )
        self._file, self._reason = file, reason

    def __reduce__(self) -> tuple[type[NotInPlaceError], tuple[Path, str]]:
        return type(self), (self._file, self._reason)  # a worker process hands it on


def require_pyarrow(file: Path) -> None:
    """Raise :class:`ConfigError` where pyarrow, which reads ``file``, is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{file} is read by pyarrow: pip install 'megatron_nepa[huggingface]'.") from error


def open_table(file: Path) -> ArrowStream | ParquetTable:
    """Open a file by its extension.

    Raises:
        ConfigError: it is damaged or cut short, or pyarrow is missing.
    """
    require_pyarrow(file)
    with _errors_of(file):
        return ParquetTable(file) if file.suffix == ".parquet" else ArrowStream(file)


class ArrowStream:
    """A file of record batches in Arrow's streaming format, as ``datasets`` saves and caches them."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self.file = file
        with pa.memory_map(str(file)) as mapped:
            self._whole = mapped.read_buffer()
        require(self._whole.size > 0, f"{file} is empty: get it again.")
        require(
            self._whole[-8:].to_pybytes() == _END_OF_STREAM,
            f"{file} does not end as an Arrow stream does, so it may be cut short: get it again, or save the set again "
            "with save_to_disk.",
        )
        self.schema = pa.ipc.open_stream(self._whole).schema

    def __enter__(self) -> ArrowStream:
        return self

    def __exit__(self, *_: object) -> None:
        del self._whole

    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(batch.num_rows for batch in self.batches())

    def batches(self, columns: list[str] | None = None, start: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows from ``start`` on, which copies nothing."""
        import pyarrow as pa

        with _errors_of(self.file):
            for batch in pa.ipc.open_stream(self._whole):
                batch.validate(full=True)  # its offsets, not its images: damaged ones would lead anywhere
                skipped = min(start, batch.num_rows)
                start -= skipped
                rest = batch.slice(skipped)
                for place in range(0, rest.num_rows, _BATCH):
                    part = rest.slice(place, _BATCH)
                    yield part if columns is None else part.select(columns)

    def locate(self, column: str) -> Locator:
        """What tells where the values of a column lie."""
        return _Addresses(self.file, self._whole)


class ParquetTable:
    """A parquet file, of which some rows are held at a time."""

    def __init__(self, file: Path) -> None:
        import pyarrow.parquet as pq

        self.file = file
        self._table = pq.ParquetFile(file, memory_map=True, buffer_size=1 << 20, pre_buffer=False)
        self.schema = self._table.schema_arrow

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()

    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self._table.metadata.num_rows)

    def batches(self, columns: list[str] | None = None, start: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows from ``start`` on, one row group after the other."""
        with _errors_of(self.file):
            for group in range(self._table.num_row_groups):
                rows = self._table.metadata.row_group(group).num_rows
                skipped, start = start, max(0, start - rows)
                if skipped >= rows:
                    continue
                for batch in self._table.iter_batches(_BATCH, row_groups=[group], columns=columns):
                    rest = batch.slice(min(skipped, batch.num_rows))
                    skipped -= batch.num_rows - rest.num_rows
                    if rest.num_rows:
                        yield rest

    def locate(self, column: str) -> Locator:
        """What tells where the values of a column lie.

        Raises:
            NotInPlaceError: they are compressed.
        """
        chunks = []
        for group in range(self._table.num_row_groups):
            facts = self._table.metadata.row_group(group)
            for number in range(facts.num_columns):
                chunk = facts.column(number)
                if chunk.path_in_schema not in (column, f"{column}.bytes"):
                    continue
                if chunk.compression != "UNCOMPRESSED":
                    raise NotInPlaceError(self.file, f"are compressed ({chunk.compression})")
                starts = [chunk.data_page_offset, chunk.dictionary_page_offset]
                start = min(place for place in starts if place is not None)
                chunks.append((start, start + chunk.total_compressed_size))
        return _Search(self.file, chunks)


class Locator(ABC):
    """Tells where the values of a column lie, batch by batch in their order."""

    @abstractmethod
    def __call__(self, values: pa.Array) -> Ranges:
        """Offset in the file and size of each value, int64 [n]; a size of 0 where there is none.

        Raises:
            NotInPlaceError: they do not lie in the file as they are.
        """


class _Addresses(Locator):
    def __init__(self, file: Path, whole: pa.Buffer) -> None:
        self._file, self._whole = file, whole

    def __call__(self, values: pa.Array) -> Ranges:
        import pyarrow as pa

        kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        _, ends, content = values.buffers()
        if values.null_count == len(values) or content is None:
            nothing = np.zeros(len(values), np.int64)
            return nothing, nothing
        edges = np.frombuffer(ends, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
        offset, size = content.address - self._whole.address + edges[:-1], np.diff(edges)
        if (offset < 0).any() or (offset + size > self._whole.size).any() or (size < 0).any():
            raise NotInPlaceError(self._file, "are compressed")
        return offset, size


class _Search(Locator):
    def __init__(self, file: Path, chunks: list[tuple[int, int]]) -> None:
        self._file, self._chunks = file, chunks
        with open(file, "rb") as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._number, self._place = 0, chunks[0][0] if chunks else 0

    def __call__(self, values: pa.Array) -> Ranges:
        offset, size = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
        for i, value in enumerate(values):
            if content := value.as_py():
                offset[i], size[i] = self._find(content), len(content)
        return offset, size

    def _find(self, content: bytes) -> int:
        """Where the value stands: behind the one before in its chunk of a row group, or in one of the next."""
        stored = len(content).to_bytes(4, "little") + content  # as parquet's plain encoding has it
        while self._number < len(self._chunks):
            start, end = self._chunks[self._number]
            place = self._bytes.find(stored, self._place, end)
            if place < 0:  # a dictionary holds a repeated value once
                place = self._bytes.find(stored, start, self._place)
            if place >= 0:
                self._place = max(self._place, place + len(stored))
                return place + 4
            self._number += 1
            self._place = self._chunks[self._number][0] if self._number < len(self._chunks) else 0
        raise NotInPlaceError(self._file, "are not stored plainly, one behind the other")


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises about a file into a sentence that names it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"{file} cannot be read ({first}): is it damaged or cut short? Get it again.") from error
