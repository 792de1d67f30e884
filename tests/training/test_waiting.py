"""A long wait is named, a short one is not."""

from __future__ import annotations

import time

import pytest

from megatron_nepa.training.reporting import waiting


@pytest.mark.parametrize(("patience", "is_main", "said"), [(0.01, True, ["a ..."]), (0.01, False, []), (60, True, [])])
def test_only_a_long_wait_is_named_by_the_main_rank(
    patience: float, is_main: bool, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", patience)
    lines: list[str] = []
    with waiting.waiting_for("a", is_main, lines.append):
        time.sleep(0.2)
    assert lines == said
