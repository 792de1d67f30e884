"""Files on file systems without locks, without room and without permission."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_nepa.data.indexing.lock import claimed
from megatron_nepa.files import STALE_SECONDS, AlreadyHeldError, Hold, try_to_write

GONE = 2**22 + 1  # above the largest number of a process


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)


def test_locks_hold_until_they_are_released(tmp_path: Path) -> None:
    hold = Hold(tmp_path / "file")
    assert hold.notes == []
    with pytest.raises(AlreadyHeldError):
        Hold(tmp_path / "file")
    hold.release()
    Hold(tmp_path / "file").release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_a_note_holds(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    hold = Hold(tmp_path / "file")
    assert [note[:29] for note in hold.notes] == ["no locks on this file system "]
    with pytest.raises(AlreadyHeldError, match=f"process {os.getpid()} on {socket.gethostname()} holds it"):
        Hold(tmp_path / "file")
    hold.release()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("host", "process", "age", "taken"),
    [
        ("node7", 1, 0.0, False),
        ("node7", 1, STALE_SECONDS - 5, False),
        ("node7", 1, STALE_SECONDS + 5, True),
        (socket.gethostname(), GONE, 0.0, True),
        (socket.gethostname(), os.getpid(), 0.0, False),
    ],
    ids=["new, elsewhere", "refreshed, elsewhere", "stale, elsewhere", "gone, here", "alive, here"],
)
def test_a_note_that_is_not_refreshed_is_taken_over(
    host: str, process: int, age: float, taken: bool, tmp_path: Path, no_locks: None
) -> None:
    found = {"host": host, "process": process, "time": time.time() - age}
    (tmp_path / "file.owner").write_text(json.dumps(found))
    if taken:
        hold = Hold(tmp_path / "file")
        assert "which is gone: taken over." in hold.notes[0]
        hold.release()
    else:
        with pytest.raises(AlreadyHeldError, match=f"process {process} on {host} holds it"):
            Hold(tmp_path / "file")


def test_a_note_is_refreshed(tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_nepa.files._REFRESH_SECONDS", 0.05)
    hold = Hold(tmp_path / "file")
    first = json.loads((tmp_path / "file.owner").read_text())["time"]
    until = time.monotonic() + 20
    while json.loads((tmp_path / "file.owner").read_text())["time"] == first and time.monotonic() < until:
        time.sleep(0.02)
    assert json.loads((tmp_path / "file.owner").read_text())["time"] > first
    hold.release()


def test_an_index_is_written_without_locks(tmp_path: Path, no_locks: None, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(tmp_path / "index/facts.json", {"a": 1}, "begun with others"):
        pass
    assert capsys.readouterr().err.startswith("no locks on this file system")
    assert json.loads((tmp_path / "index/facts.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_folder_is_tried_before_it_is_needed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_to_write(tmp_path / "checkpoints")

    def fsync(_: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(number)):
        try_to_write(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_file_in_a_folders_place(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="exists"):
        try_to_write(tmp_path / "checkpoints")
