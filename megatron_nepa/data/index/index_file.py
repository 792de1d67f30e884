"""An index on disk: a folder of plain numpy arrays, memory-mapped when it is opened, and one JSON file.

    INDEX/index.json        version, root, classes, shards and their stamps, quarantine, fingerprint, sizes of arrays
    INDEX/*.npy             names, their ends, width, height, label, and where there are any shard, offset, size, masks,
                            mask_offset, mask_size

Ours rather than Arrow's or a database's: arrays of numpy are mapped by every rank of a node and need no library to
read. Opening one reads none of its rows, however many it has, and ranks of a node share its pages: the fingerprint
was computed when the index was written, and that a shard is still the one that was indexed is checked as it is opened.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames, Stamp
from megatron_nepa.data.index.storage import shard_stamp

VERSION = 1
_JSON = "index.json"
_LARGE = 2**26  # bytes of an array, of which a rank touches a few rows a batch
_COLUMNS = ("width", "height", "label", "shard", "offset", "size")
_MASK_COLUMNS = ("mask_offset", "mask_size")  # written where masks lie in shards
_NAMES = ("names", "masks")


def is_index(path: str | Path) -> bool:
    """Whether ``path`` is the folder of an index."""
    return (Path(path) / _JSON).is_file()


def save_index(index: DatasetIndex, path: str | Path) -> None:
    """Write ``index`` beside ``path`` and rename it there: the folder is complete or absent.

    Images below the folder that holds the index are remembered relative to it, so the two can be moved together.

    Raises:
        ConfigError: ``path`` exists already or cannot be written.
    """
    target = Path(path)
    require(not target.exists(), f"{target} exists already: remove it, or choose another name for the index.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}-{secrets.token_hex(4)}")  # mkdtemp would lock out others
        beside.mkdir()
    except OSError as error:
        raise ConfigError(f"the index {target} cannot be written: {error.strerror}.") from error
    try:
        for name in (*_COLUMNS, *(_MASK_COLUMNS if len(index.mask_offset) else ())):
            np.save(beside / f"{name}.npy", getattr(index, name))
        for name in _NAMES:
            packed: PackedNames = getattr(index, name)
            np.save(beside / f"{name}.npy", packed.text)
            np.save(beside / f"{name}_ends.npy", packed.ends)
        root, home = index.root.resolve(), target.parent.resolve()
        facts = {
            "version": VERSION,
            "images": len(index),
            "root": os.path.relpath(root, home) if root.is_relative_to(home) else str(root),
            "classes": index.classes,
            "shards": index.shards,
            "stamps": [shard_stamp(index.root / shard) for shard in index.shards],
            "quarantine": index.quarantine,
            "fingerprint": index.fingerprint(),
            "arrays": {file.name: file.stat().st_size for file in sorted(beside.iterdir())},
        }
        (beside / _JSON).write_text(json.dumps(facts, indent=1))
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_index(path: str | Path) -> DatasetIndex:
    """Open the index that :func:`save_index` wrote; its arrays stay on disk until they are touched.

    Raises:
        ConfigError: no index there, one of another version, or one that lost a file.
    """
    folder = Path(path)
    require(is_index(folder), f"{folder} is no index: it has no {_JSON}.")
    try:
        facts = json.loads((folder / _JSON).read_text())
        require(
            facts["version"] == VERSION,
            f"{folder} is an index of version {facts['version']}, not {VERSION}: index the data again.",
        )
        for name, size in facts.get("arrays", {}).items():
            found = (folder / name).stat().st_size
            require(
                found == size, f"{folder / name} has {found} bytes where {size} were written: index the data again."
            )
        in_shards = _MASK_COLUMNS if (folder / f"{_MASK_COLUMNS[0]}.npy").is_file() else ()
        columns: dict[str, Any] = {name: _mapped(folder / f"{name}.npy") for name in (*_COLUMNS, *in_shards)}
        names, masks = (
            PackedNames(*(_mapped(folder / f"{name}{part}.npy") for part in ("", "_ends"))) for name in _NAMES
        )
        return DatasetIndex(
            root=folder.resolve().parent / facts["root"],
            names=names,
            masks=masks,
            classes=tuple(facts["classes"]),
            shards=tuple(facts["shards"]),
            quarantine=tuple((name, reason) for name, reason in facts["quarantine"]),
            stamps=tuple(Stamp(*stamp) for stamp in facts.get("stamps", ())),
            recorded_fingerprint=facts.get("fingerprint", ""),
            **columns,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"the index {folder} is damaged ({reason}): index the data again.") from error


def _mapped(file: Path) -> npt.NDArray[Any]:
    """An array on disk, of which pages come into memory as they are touched."""
    array: npt.NDArray[Any] = np.load(file, mmap_mode="r")
    if array.nbytes > _LARGE and isinstance(array.base, mmap.mmap):
        # rows are touched in random order: what the system would read ahead fills memory and is never looked at
        array.base.madvise(mmap.MADV_RANDOM)
    return array
