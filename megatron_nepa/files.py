"""Files on the file systems that clusters have: replaced whole, and folders held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Lustre mounted without flock, some NFS and FUSE: the call is not served there
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0  # after which the note of a process that does not refresh it counts for nothing


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its name at the end; where the block fails it is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_or_absent(path) as partial, partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class AlreadyHeldError(OSError):
    """Another process holds the file; the message says which, where that is known."""


class Hold:
    """A file that this process holds until it is released or the process ends.

    By flock, also between nodes where the file system carries it. Where it does not, by a note beside the file with
    host, process and a time that is refreshed: a note that was not for a minute, or whose process on this host is gone,
    is taken over.

    Args:
        path: of the file, made where it is missing; its contents are left alone.

    Attributes:
        notes: sentences for the user: that there are no locks here, whose note was taken over.

    Raises:
        AlreadyHeldError: another process holds it.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self._note: Path | None = None
        self._released = threading.Event()
        self._path = path
        self._file = path.open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise AlreadyHeldError(f"another process holds {path}") from None
        except OSError as error:
            self._file.close()
            if error.errno not in _NO_LOCKS:
                raise
            self._hold_by_note(path.with_name(f"{path.name}.owner"), error)

    def is_lost(self) -> bool:
        """Whether the file was removed or replaced since, so that another process could hold what has its name now."""
        if self._note is not None:  # it is written again by itself
            return not self._path.exists()
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except OSError:
            return True

    def release(self) -> None:
        """Let others hold the file."""
        self._released.set()
        self._file.close()
        if self._note is not None and _read(self._note) == self._owner | {"time": self._time}:
            with contextlib.suppress(OSError):
                self._note.unlink()

    def _hold_by_note(self, note: Path, reason: OSError) -> None:
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "key": secrets.token_hex(8),
        }
        found = _read(note)
        if found is not None:
            who = f"process {found.get('process')} on {found.get('host')}"
            age = time.time() - float(found.get("time", 0))
            if not _is_gone(found, age):
                raise AlreadyHeldError(f"{who} holds it, by {note} of {max(age, 0):.0f} s ago")
            self.notes.append(f"{note} is left of {who}, which is gone: taken over.")
        self._note, self._time = note, time.time()
        self._write()
        time.sleep(0.2)  # for another that took it over in the same moment: the last one to write has it
        if (_read(note) or {}).get("key") != self._owner["key"]:
            raise AlreadyHeldError(f"another process took {note} in the same moment")
        self.notes.append(f"no locks on this file system ({reason.strerror}): {note} keeps other runs away instead.")
        threading.Thread(target=self._refresh, name="hold", daemon=True).start()

    def _refresh(self) -> None:
        while not self._released.wait(_REFRESH_SECONDS):
            self._time = time.time()
            with contextlib.suppress(OSError):  # a disk that comes back is written again
                self._write()

    def _write(self) -> None:
        assert self._note is not None
        replace_text(self._note, json.dumps(self._owner | {"time": self._time}))


def _read(note: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_gone(owner: dict[str, Any], age: float) -> bool:
    if owner.get("host") == socket.gethostname():
        try:
            os.kill(int(owner.get("process", 0)) or -1, 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            pass
    return age > STALE_SECONDS


def try_to_write(folder: Path) -> None:
    """Make a folder and write, rename and remove a small file in it, as a later save will; nothing stays behind.

    Raises:
        OSError: it cannot be done: no permission, no room, a file in the folder's place.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".trial_{secrets.token_hex(4)}"
    try:
        replace_text(trial, "can a checkpoint be saved here?\n" * 128)
    finally:
        for path in (trial, trial.with_name(f".{trial.name}.partial")):
            path.unlink(missing_ok=True)
        if is_new:
            folder.rmdir()
