"""Notes and remains in a folder of checkpoints: read as they were written, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore
from megatron_nepa.config import ConfigError

DAMAGED = {
    "empty": b"",
    "cut short": b'{"checkpoint": "step_0000',
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "no checkpoint": b'{"value": 1.0}',
    "a checkpoint that is a number": b'{"checkpoint": 4, "value": 1.0}',
    "no value": b'{"checkpoint": "step_00000004"}',
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_note_of_the_best_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "best.json").write_bytes(content)
    for ask in (CheckpointStore(tmp_path).best, CheckpointStore(tmp_path).best_value):
        with pytest.raises(ConfigError, match=r"best\.json .*remove it to have"):
            ask()


def test_a_note_of_the_best_is_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.best() is None  # no note
    step = store.path_of(4)
    store.mark_best(step, "val_top1", 0.5)
    assert store.best() is None  # a checkpoint that somebody removed
    step.mkdir()
    assert (store.best(), store.best_value(), store.best_metric()) == (step, 0.5, "val_top1")


def test_what_a_save_left_is_removed_whatever_it_is(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (tmp_path / ".step_00000001.partial").mkdir()
    (tmp_path / ".step_00000002.partial").write_text("")
    (tmp_path / ".step_00000003.partial").symlink_to(kept)
    store.remove_partial()
    assert list(tmp_path.iterdir()) == [kept]
