"""Joining parts of features into one file, part by part: npy, safetensors or parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import PackedNames
from megatron_nepa.files import replace_text, whole_or_absent

Writer = Callable[[Path, Sequence[Path], tuple[int, ...], str, PackedNames], None]
_SAFETENSORS_TYPE = {"float32": "F32", "float16": "F16"}


def write_npy(out: Path, parts: Sequence[Path], shape: tuple[int, ...], dtype: str, names: PackedNames) -> None:
    """One array, which ``np.load(OUT, mmap_mode="r")`` reads in place; the names in ``OUT.names.txt``."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    _write_names(out, names)
    with whole_or_absent(out) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        _append(file, parts)


def write_safetensors(out: Path, parts: Sequence[Path], shape: tuple[int, ...], dtype: str, names: PackedNames) -> None:
    """One tensor, "features"; the names in ``OUT.names.txt``.

    safetensors' own writer wants the whole tensor in memory; the format is a length, a JSON header and the bytes.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    tensor = {"dtype": _SAFETENSORS_TYPE[dtype], "shape": list(shape), "data_offsets": [0, num_bytes]}
    header = json.dumps({"features": tensor}).encode()
    header += b" " * (-len(header) % 8)
    _write_names(out, names)
    with whole_or_absent(out) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        _append(file, parts)


def write_parquet(out: Path, parts: Sequence[Path], shape: tuple[int, ...], dtype: str, names: PackedNames) -> None:
    """Columns "file" and "features", a list of fixed length a row; patches lie one after another in it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("a .parquet file needs pyarrow: pip install 'megatron_nepa[huggingface]'.") from None
    width = int(np.prod(shape[1:]))
    schema = pa.schema({"file": pa.string(), "features": pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), width)})
    schema = schema.with_metadata({"shape": json.dumps(shape[1:])})
    with whole_or_absent(out) as partial, pq.ParquetWriter(partial, schema) as writer:
        first = 0
        for part in parts:
            array = np.load(part)
            rows = [_printable(names[i]) for i in range(first, first + len(array))]
            features = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), width)
            writer.write_table(pa.table([pa.array(rows), features], schema=schema))
            first += len(array)


WRITERS: dict[str, Writer] = {".npy": write_npy, ".safetensors": write_safetensors, ".parquet": write_parquet}


def _append(file: Any, parts: Sequence[Path]) -> None:
    for part in parts:
        file.write(np.load(part).tobytes())


def _write_names(out: Path, names: PackedNames) -> None:
    lines = [_printable(names[i]) + "\n" for i in range(len(names))]
    replace_text(out.with_name(f"{out.name}.names.txt"), "".join(lines))


def _printable(name: str) -> str:
    """A name with escapes for what is no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
