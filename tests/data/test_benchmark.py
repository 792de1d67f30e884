"""The data benchmark runs and its figures fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nepa.benchmarks import forms
from megatron_nepa.benchmarks.data import PAIRS, benchmark, lines


def test_data_benchmark(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short round: a ratio is the quotient of its pair, and planning is a small part of a batch."""
    monkeypatch.setattr("megatron_nepa.benchmarks.input_rounds.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("megatron_nepa.benchmarks.data.IMAGENET_IMAGES", 1000)
    report = benchmark(photographs, batch=16, threads=1, rounds=1, batches=2)
    speed = report.images_per_second
    assert set(speed) == set(PAIRS) | set(PAIRS.values())
    for other, own in PAIRS.items():
        assert report.ratio[other] == pytest.approx(speed[own] / speed[other])
        assert report.spread[other] == (speed[other], speed[other])
    assert 0 < report.plan_share < 0.2
    assert report.cores_per_h100 == pytest.approx(3000 / report.images_per_second_per_core)
    text = "\n".join(lines(report, 1))
    assert all(name in text for name in speed)


def test_forms_benchmark(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short round; that every form shows the same crops is asked for in it."""
    monkeypatch.setattr("megatron_nepa.benchmarks.forms.SETTLE_SECONDS", 0.0)
    report = forms.benchmark(photographs, batch=16, threads=1, rounds=1, batches=2)
    speed = report.images_per_second
    assert set(speed) == {"files", "tar shards", "Arrow", "parquet"}
    assert report.ratio == {
        name: pytest.approx(speed[name] / speed["tar shards"]) for name in speed if name != forms.TAR
    }
    assert report.cpu_ratio.keys() == report.ratio.keys()
