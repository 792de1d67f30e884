"""``state.json``, a checkpoint's manifest: what the run was, and the size and checksum of every file.

The checksum is a CRC-32 of the CRC-32s of 64 MiB pieces. It finds damage (a torn write, a flipped bit), not forgery; a
core computes some 3 GB/s and pieces go in parallel, so the disk that is read sets the pace.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_nepa.config import ConfigError, require

STATE_FILE = "state.json"
FORMAT_VERSION = 1
_PIECE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_THREADS = 8


class DamagedCheckpointError(ConfigError):
    """A checkpoint whose files are not what was written.

    Attributes:
        fact: which file, and what is wrong with it.
    """

    def __init__(self, fact: str) -> None:
        super().__init__(f"the checkpoint is damaged: {fact}; name another one.")
        self.fact = fact


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and checksum of a file, as the manifest holds them."""
    size = path.stat().st_size
    with ThreadPoolExecutor(_THREADS) as pool:
        pieces = pool.map(lambda start: _checksum_piece(path, start), range(0, size, _PIECE_BYTES))
        return {"size": size, "checksum": _hex(b"".join(piece.to_bytes(4, "little") for piece in pieces))}


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write and fsync ``state.json``, sealed with a checksum of its own.

    Args:
        folder: of the checkpoint, its other files already on disk.
        values: plain values, with ``files``: name to :func:`file_facts`.
    """
    sealed = {"format_version": FORMAT_VERSION, **values}
    sealed["checksum"] = _seal(sealed)
    with (folder / STATE_FILE).open("w") as file:
        json.dump(sealed, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, checked against the presence and size of its files.

    Raises:
        DamagedCheckpointError: naming the file that is not what was written.
        ConfigError: for another format version.
    """
    path = checkpoint / STATE_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        checksum = values.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # the latter of a list
        raise DamagedCheckpointError(f"{path} cannot be read ({error})") from None
    version = values.get("format_version")
    require(
        version == FORMAT_VERSION,
        f"{checkpoint} has format version {version}; this release reads version {FORMAT_VERSION}.",
    )
    if checksum != _seal(values):
        raise DamagedCheckpointError(f"{path} was changed after it was written")
    for name, facts in values["files"].items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if found != facts["size"]:
            state = "missing" if found is None else f"{found} bytes"
            raise DamagedCheckpointError(f"{checkpoint / name} is {state} where {facts['size']} bytes were written")
    return values


def verify_files(checkpoint: Path, rank: int = 0, num_ranks: int = 1) -> dict[str, Any]:
    """Read a checkpoint's files and compare their checksums; each of several ranks reads its share.

    Returns:
        The checkpoint's :func:`read_manifest`.

    Raises:
        DamagedCheckpointError: naming the file that is not what was written.
    """
    manifest = read_manifest(checkpoint)
    files = manifest["files"]
    for name in sorted(files)[rank::num_ranks]:
        if file_facts(checkpoint / name) != files[name]:
            raise DamagedCheckpointError(f"{checkpoint / name} does not have the checksum that it was written with")
    return manifest


def _checksum_piece(path: Path, start: int) -> int:
    checksum, left = 0, _PIECE_BYTES
    with path.open("rb") as file:
        file.seek(start)
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
    return checksum


def _seal(values: dict[str, Any]) -> str:
    return _hex(json.dumps(values, sort_keys=True).encode())


def _hex(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
