"""An index on disk: a folder of plain numpy arrays, memory-mapped when it is opened, and one JSON file.

    INDEX/index.json        version, root, classes, fingerprint, sizes of arrays
    INDEX/*.npy             of images: names, their ends, width, height, label, and where there are any shard, offset,
                            size, masks, mask_offset, mask_size
                            of the set: shards and their stamps, what was left out and why, the labels that occur

Ours rather than Arrow's or a database's: arrays of numpy are mapped by every rank of a node and need no library to
read. Opening one reads none of its rows, however many it has, and ranks of a node share its pages: the fingerprint
was computed when the index was written, and that a shard is still the one that was indexed is checked as it is opened.
"""

from __future__ import annotations

import json
import mmap
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames, PackedReasons, PackedStamps, Stamp
from megatron_nepa.data.index.index_writer import (
    COLUMNS,
    JSON_FILE,
    LABELS_FILE,
    MASK_COLUMNS,
    NAMES,
    VERSION,
    IndexWriter,
    root_in_index,
)
from megatron_nepa.data.remote.folder import RemoteFolder, is_url

_LARGE = 2**26  # bytes of an array, of which a rank touches a few rows a batch


def is_index(path: str | Path) -> bool:
    """Whether ``path`` is the folder of an index."""
    return (Path(path) / JSON_FILE).is_file()


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
        writer = IndexWriter(beside)
    except OSError as error:
        raise ConfigError(f"the index {target} cannot be written: {error.strerror}.") from error
    try:
        writer.append(index, writer.add_shards(index))
        writer.leave_out(index.quarantine)
        writer.finish(root_in_index(index.root, target), index.classes)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_index(path: str | Path) -> DatasetIndex:
    """Open the index that :func:`save_index` wrote; its arrays stay on disk until they are touched.

    Raises:
        ConfigError: no index there, one of another version, or one that lost a file.
    """
    folder = Path(path)
    require(is_index(folder), f"{folder} is no index: it has no {JSON_FILE}.")
    try:
        facts = json.loads((folder / JSON_FILE).read_text())
        require(
            facts["version"] in (1, VERSION),
            f"{folder} is an index of version {facts['version']}, not {VERSION}: index the data again.",
        )
        for name, size in facts.get("arrays", {}).items():
            found = (folder / name).stat().st_size
            require(
                found == size, f"{folder / name} has {found} bytes where {size} were written: index the data again."
            )
        in_shards = MASK_COLUMNS if (folder / f"{MASK_COLUMNS[0]}.npy").is_file() else ()
        columns: dict[str, Any] = {name: _mapped(folder / f"{name}.npy") for name in (*COLUMNS, *in_shards)}
        return DatasetIndex(
            root=RemoteFolder(facts["root"]) if is_url(facts["root"]) else folder.resolve().parent / facts["root"],
            classes=tuple(facts["classes"]),
            recorded_fingerprint=facts.get("fingerprint", ""),
            **columns,
            **(_of_version_1(folder, facts) if facts["version"] == 1 else _packed(folder)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"the index {folder} is damaged ({reason}): index the data again.") from error


def _packed(folder: Path) -> dict[str, Any]:
    names = {name: _mapped_names(folder, name) for name in NAMES}
    return {
        "names": names["names"],
        "masks": names["masks"],
        "shards": names["shards"],
        "stamps": PackedStamps(names["stamps"]),
        "quarantine": PackedReasons(names["left_out"], names["reasons"]),
        "recorded_labels": np.load(folder / LABELS_FILE),
    }


def _of_version_1(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "names": _mapped_names(folder, "names"),
        "masks": _mapped_names(folder, "masks"),
        "shards": tuple(facts["shards"]),
        "stamps": tuple(Stamp(*stamp) for stamp in facts.get("stamps", ())),
        "quarantine": tuple((name, reason) for name, reason in facts["quarantine"]),
    }


def _mapped_names(folder: Path, name: str) -> PackedNames:
    return PackedNames(_mapped(folder / f"{name}.npy"), _mapped(folder / f"{name}_ends.npy"))


def _mapped(file: Path) -> npt.NDArray[Any]:
    """An array on disk, of which pages come into memory as they are touched."""
    array: npt.NDArray[Any] = np.load(file, mmap_mode="r")
    if mapping := _large_mapping(array):
        # rows are touched in random order: what the system would read ahead fills memory and is never looked at
        mapping.madvise(mmap.MADV_RANDOM)
    return array


def let_go(index: DatasetIndex) -> None:
    """Hand the pages of a large index that this process looked at back to the system, which keeps them in its cache.

    Without it a rank that draws from all over the index comes to hold all of it, page by page.
    """
    columns = (*COLUMNS, *MASK_COLUMNS)
    names = (index.names.text, index.names.ends, index.masks.text, index.masks.ends)
    for array in (*(getattr(index, name) for name in columns), *names):
        if mapping := _large_mapping(array):
            mapping.madvise(mmap.MADV_DONTNEED)


def _large_mapping(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """The mapping that a large array lies in; None where it is small, or in memory."""
    base: Any = array if array.nbytes > _LARGE else None
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
