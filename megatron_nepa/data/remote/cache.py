"""Keeps byte ranges that were read in a folder of this machine, which several processes share and none outgrows."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from megatron_nepa.config import ConfigError
from megatron_nepa.files import AlreadyHeldError, Hold, try_to_write

_SUFFIX = ".range"
_CHECK_BYTES = 16  # behind the bytes, since a machine that lost its power may keep a file's length alone
_KEPT_SHARE = 0.9  # of the allowed bytes, after the oldest were removed
_LOOK_SHARE = 0.05  # of the allowed bytes, after the writing of which a process looks at what all have written


class RangeCache:
    """Byte ranges by key, each a file of its own that is whole or absent.

    A range is written beside and renamed, so any number of processes may read and write the folder; one at a time
    removes the oldest when all of them together are too large, which may be exceeded by a twentieth for each process.

    Args:
        folder: made where it is missing.
        most_bytes: size that its ranges are held to.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._lock, self._written, self._full = threading.Lock(), 0, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try_to_write(folder)
        except OSError as error:
            raise ConfigError(
                f"the cache {folder} cannot be written: {(error.strerror or str(error)).lower()}."
            ) from error

    def get(self, key: str, size: int, read: Callable[[], bytes]) -> bytes:
        """The range of that key, or what ``read`` gives, which is kept.

        Args:
            key: names shard, version and place.
            size: bytes of the range.
            read: reads it.
        """
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        path = self._folder / name[:3] / f"{name[3:]}{_SUFFIX}"
        with contextlib.suppress(OSError):
            kept = path.read_bytes()
            if len(kept) == size + _CHECK_BYTES and _check(kept[:size]) == kept[size:]:
                return kept[:size]
        data = read()
        self._keep(path, data + _check(data))
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        partial = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:  # a full disk takes nothing from a run that has the bytes
            with contextlib.suppress(OSError):
                partial.unlink()
            if not self._full:
                self._full = True
                print(f"the cache {self._folder} takes no more: {error.strerror}", file=sys.stderr, flush=True)
            return
        with self._lock:
            self._written += len(data)
            looks = self._written > _LOOK_SHARE * self._most_bytes
        if looks and self.trim():  # where another process does, the next range asks again: it has not seen this one
            with self._lock:
                self._written = 0

    def trim(self) -> bool:
        """Remove the oldest ranges where all together are too large; False where another process does."""
        try:
            hold = Hold(self._folder / "trim.lock")
        except (AlreadyHeldError, OSError):
            return False
        try:
            files = []
            for folder in os.scandir(self._folder):
                if folder.is_dir():
                    for file in os.scandir(folder.path):
                        with contextlib.suppress(FileNotFoundError):
                            facts = file.stat()
                            files.append((facts.st_mtime_ns, facts.st_size, file.path))
            total = sum(size for _, size, _ in files)
            if total <= self._most_bytes:
                return True
            for _, size, path in sorted(files):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= size
                if total <= _KEPT_SHARE * self._most_bytes:
                    break
            return True
        finally:
            hold.release()


def _check(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECK_BYTES).digest()
