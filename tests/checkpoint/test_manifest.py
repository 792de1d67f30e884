"""A checkpoint's state.json that is not what was written is named as damage, whatever it holds instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_nepa.checkpoint.format.manifest import (
    STATE_FILE,
    DamagedCheckpointError,
    file_facts,
    read_manifest,
    write_manifest,
)
from megatron_nepa.config import ConfigError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"0123456789")
    write_manifest(tmp_path, {"files": {"weights": file_facts(tmp_path / "weights")}})
    assert read_manifest(tmp_path)["files"].keys() == {"weights"}
    return tmp_path


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"[]", b"7", b"null", b'"text"', b"{}", b"\xff\xfe\x00", b'{"checksum": "0"', b"\0" * 64],
)
def test_what_is_no_manifest_is_damage(content: bytes, checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"state\.json cannot be read"):
        read_manifest(checkpoint)


def test_what_was_changed_is_damage(checkpoint: Path) -> None:
    values = json.loads((checkpoint / STATE_FILE).read_text())
    for change, message in (({"more": 1}, "changed after it was written"), ({"format_version": 99}, "version 99")):
        (checkpoint / STATE_FILE).write_text(json.dumps({**values, **change}))
        with pytest.raises(ConfigError, match=message):
            read_manifest(checkpoint)
    for content, message in ((b"012345678", "is 9 bytes where 10 bytes"), (None, "is missing where 10 bytes")):
        (checkpoint / STATE_FILE).write_text(json.dumps(values))
        (checkpoint / "weights").unlink()
        if content is not None:
            (checkpoint / "weights").write_bytes(content)
        else:
            (checkpoint / "weights").mkdir()
        with pytest.raises(DamagedCheckpointError, match=message):
            read_manifest(checkpoint)
