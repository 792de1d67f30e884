"""The Arrow and parquet files of a data set in Hugging Face's forms: saved to disk, cached, or as on the hub."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.splits import choose_split

TABLES = (".parquet", ".arrow")
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


@dataclass(frozen=True)
class TableSet:
    """The files of one split of a data set.

    Attributes:
        root: their folder.
        files: below it, in the order of the rows.
        features: what ``datasets`` noted of the columns beside the files.
        rows: which rows of the files, one behind the other, the set consists of; None means all.
        notes: what the user should know.
    """

    root: Path
    files: tuple[str, ...]
    features: dict[str, Any] = field(default_factory=dict)
    rows: npt.NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved a set in ``folder`` (``save_to_disk``)."""
    return (folder / _DICT).is_file() or (folder / _STATE).is_file()


def saved_tables(folder: Path, split: str) -> TableSet:
    """The files of a folder that ``save_to_disk`` wrote.

    Args:
        folder: of a set, or of several splits.
        split: the one of several to take.

    Raises:
        ConfigError: a file that is missing or damaged, or no such split.
    """
    notes: tuple[str, ...] = ()
    if (folder / _DICT).is_file():
        splits = _read(folder / _DICT).get("splits")
        if not isinstance(splits, list) or not splits:
            raise ConfigError(f"{folder / _DICT} names no splits: save the set again.")
        # as the files of splits would be named
        (chosen, *_), notes = choose_split([f"{name}-0-of-1" for name in splits], split, str(folder))
        folder = folder / chosen.removesuffix("-0-of-1")
    state = _read(folder / _STATE)
    files, indices = _names(folder, state.get("_data_files")), _names(folder, state.get("_indices_data_files") or [])
    features = _read(folder / _INFO).get("features") if (folder / _INFO).is_file() else None
    rows = np.concatenate([_indices(folder / name) for name in indices]) if indices else None
    return TableSet(folder, files, features if isinstance(features, dict) else {}, rows, notes)


def loose_tables(root: Path, names: list[str], split: str) -> TableSet:
    """Parquet files as they lie on the hub, or Arrow files as ``datasets`` caches them.

    Args:
        root: their folder.
        names: paths below it.
        split: the one of several to take.

    Raises:
        ConfigError: no such split, or files of several sets.
    """
    names = sorted(name for name in names if not _is_cache(posixpath.basename(name)))
    require(bool(names), f"{root} holds only files that datasets made for its own use: give the set's own folder.")
    chosen, notes = choose_split(names, split, str(root))
    folders = sorted({posixpath.dirname(name) for name in chosen})
    require(
        len(folders) == 1,
        f"{root} holds tables in several folders, {folders[0] or '.'} and {folders[-1]}, which may be different sets: "
        "give one of them.",
    )
    kinds = {posixpath.splitext(name)[1] for name in chosen}
    require(len(kinds) == 1, f"{root} holds Arrow and parquet files: move one kind away.")
    return TableSet(root, tuple(chosen), notes=notes)


def _is_cache(name: str) -> bool:
    return name.startswith(("cache-", "tmp")) or name == "indices.arrow"


def _names(folder: Path, entries: Any) -> tuple[str, ...]:
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    if not isinstance(entries, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{folder / _STATE} does not name the set's files: save it again with save_to_disk.")
    missing = next((name for name in names if not (folder / str(name)).is_file()), None)
    require(missing is None, f"{folder / str(missing)} is missing, which {_STATE} names: get the set again.")
    return tuple(map(str, names))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is no JSON object, as save_to_disk writes it: save the set again.")
    return content


def _indices(file: Path) -> npt.NDArray[np.int64]:
    """The rows that an older ``datasets`` chose without writing the chosen ones anew."""
    from megatron_nepa.data.index.table_values import open_table

    with open_table(file) as table:
        parts = [batch.column(0).to_numpy(zero_copy_only=False) for batch in table.batches()]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
