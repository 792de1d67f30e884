"""The learning-rate schedule."""

from __future__ import annotations

import math

import pytest

from megatron_nepa.training.engine.schedule import warmup_decay


def hugging_face(step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor of transformers' get_cosine_schedule_with_warmup, written from its source."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))


@pytest.mark.parametrize(("total", "warmup"), [(200, 5), (1000, 1), (7, 6)])
def test_equals_hugging_face_of_a_longer_run_one_step_later(total: int, warmup: int) -> None:
    for step in range(total):
        assert warmup_decay(step, total, warmup, 3e-4, 0.0) == pytest.approx(
            3e-4 * hugging_face(step + 1, total + 1, warmup), abs=1e-18
        )


def test_landmarks() -> None:
    rates = [warmup_decay(step, 101, 10, 1.0, 0.1) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert rates[100] > 0.1
    assert warmup_decay(101, 101, 10, 1.0, 0.1) == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert len(set(rates[9:])) == 92  # falls at every step


@pytest.mark.parametrize(
    ("step", "total", "warmup", "expected"),
    [(0, 1, 0, 1.0), (0, 1, 1, 1.0), (0, 2, 0, 1.0), (1, 2, 0, 0.625), (4, 5, 5, 1.0), (99, 5, 2, 0.25)],
)
def test_short_runs(step: int, total: int, warmup: int, expected: float) -> None:
    assert warmup_decay(step, total, warmup, 1.0, 0.25) == pytest.approx(expected)
