"""A decoder's settings that a run leaves open: how they are chosen, and what they may not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nepa.config import DataConfig
from megatron_nepa.data.decoding import timed_settings
from megatron_nepa.data.decoding.timed_settings import LOADS, THREADS, Decoded, fastest, settle
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.training.reporting.run_record import RunRecord
from tests.runs import make_images

FEED = Feed(Share(8, 8, 1, 0, 1, 0, 1), 0, torch.device("cpu"), torch.float32)


def rate(threads: int, load: float) -> float:
    """A stand-in for time: 0.12 is the best load, and threads help up to 8."""
    return 100.0 * min(threads, 8) * (1.2 if load == 0.12 else 1.0 - load / 2)


@pytest.mark.parametrize(
    ("threads", "load", "cores", "chosen"),
    [
        (None, None, 64, (8, 0.12)),
        (None, None, 3, (2, 0.12)),
        (None, None, 0, (1, 0.12)),
        (None, 1.0, 64, (8, 1.0)),
        (4, None, 64, (4, 0.12)),
    ],
)
def test_the_fastest_load_and_the_fewest_threads_that_are_about_as_fast(
    threads: int | None, load: float | None, cores: int, chosen: tuple[int, float]
) -> None:
    *found, rates = fastest(threads, load, cores, rate)
    assert tuple(found) == chosen
    assert all(count <= max(1, cores) for count, _ in rates)
    assert {each for _, each in rates} == (set(LOADS) if load is None else {load})


def test_threads_that_gain_little_are_left_to_others() -> None:
    assert fastest(None, 0.0, 64, lambda threads, load: 100.0 - 4.0 / threads)[0] == 1
    assert fastest(None, 0.0, 64, lambda threads, load: 100.0 - 6.0 / threads)[0] == 2


class Ranks:
    """Two ranks that are one: the other one's rates stand in, and everything measured is kept.

    Args:
        others: rate of the other rank, with so many threads and that load.
    """

    def __init__(self, patch: pytest.MonkeyPatch, others: Any, cores: int = 16) -> None:
        self.measured: list[tuple[int, float]] = []
        self._others = others
        patch.setattr(timed_settings, "_rate", self._rate)
        patch.setattr(timed_settings, "_first_batch", lambda *arguments: None)
        patch.setattr(timed_settings.os, "sched_getaffinity", lambda process: range(cores))
        patch.setattr(timed_settings.dist, "all_reduce", self._least)

    def _rate(self, batch: None, decoded: Decoded, options: Any) -> float:
        self.measured.append((options.num_threads, options.hw_decoder_load))
        return rate(*self.measured[-1])

    def _least(self, value: torch.Tensor, operation: Any, group: None) -> None:
        if self.measured and float(value) == rate(*self.measured[-1]):
            value.clamp_(max=self._others(*self.measured[-1]))


@pytest.fixture
def decoded(tmp_path: Path) -> Decoded:
    index = scan_folder(make_images(tmp_path / "images", 8))
    return Decoded(index, 32, torch.device("cuda", 0), 0.08)


def chosen(config: DataConfig, decoded: Decoded, kept: float | None = None) -> tuple[int | None, float | None]:
    found = settle(config, decoded, FEED, None, kept)  # type: ignore[arg-type]
    return found.num_threads, found.hw_decoder_load


def test_all_ranks_take_what_the_slowest_does_best(decoded: Decoded, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Ranks(monkeypatch, lambda threads, load: 10.0 * min(threads, 4) * (2.0 if load == 0.35 else 1.0))
    assert chosen(DataConfig(), decoded) == (4, 0.35)
    assert len(slow.measured) == len(set(slow.measured)) == len(LOADS) + len(THREADS) - 3  # 16 cores, 8 were timed
    Ranks(monkeypatch, lambda threads, load: 0.0)
    assert chosen(DataConfig(), decoded) == (2, 0.65)  # where nothing decodes, as where nothing is timed


def test_the_load_is_that_of_the_run_and_never_a_split_where_a_run_must_repeat(
    decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(monkeypatch, rate)
    assert chosen(DataConfig(), decoded, kept=0.35) == (8, 0.35)
    assert chosen(DataConfig(hw_decoder_load=1.0), decoded, kept=0.35) == (8, 1.0)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert chosen(DataConfig(), decoded) == chosen(DataConfig(), decoded, kept=0.35) == (8, 1.0)
    assert chosen(DataConfig(hw_decoder_load=0.35), decoded) == (8, 0.0)
    assert {load for _, load in ranks.measured} == {0.35, 1.0, 0.0}


def test_a_cpu_times_threads_alone_and_nothing_where_all_is_given(
    decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, on_cpu = Ranks(monkeypatch, rate, cores=4), replace(decoded, device=torch.device("cpu"))
    assert chosen(DataConfig(), on_cpu) == (4, 0.65)
    assert ranks.measured == [(1, 0.65), (2, 0.65), (4, 0.65)]
    ranks.measured.clear()
    assert chosen(DataConfig(num_threads=3), on_cpu) == (3, 0.65)
    assert chosen(DataConfig(num_threads=3, hw_decoder_load=0.3), decoded) == (3, 0.3)
    assert settle(DataConfig(), None, FEED, None) == DataConfig()  # type: ignore[arg-type]
    assert not ranks.measured


def test_images_that_do_not_decode_are_left_out_of_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_images(tmp_path / "images", 8)
    index = scan_folder(folder)
    paths = sorted(folder.iterdir())
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    monkeypatch.setattr(timed_settings, "SECONDS", 0.0)
    monkeypatch.setattr(timed_settings.dist, "all_reduce", lambda *arguments, **options: None)
    counts = []
    real = timed_settings._rate

    def counting(batch: Any, *arguments: Any) -> float:
        counts.append(len(batch.encoded))
        found = real(batch, *arguments)
        assert found > 0
        return found

    monkeypatch.setattr(timed_settings, "_rate", counting)
    on_cpu = Decoded(index, 32, torch.device("cpu"), 0.08)
    threads, _ = chosen(DataConfig(), on_cpu)
    assert threads in THREADS
    assert set(counts) == {6}
    monkeypatch.setattr(timed_settings, "_rate", real)
    for path in paths[1:]:
        path.unlink()
    assert chosen(DataConfig(), on_cpu) == (2, 0.65)


def test_a_run_that_continues_reads_its_load(tmp_path: Path) -> None:
    record = RunRecord(replace(PRETRAINING_RECIPES["quickstart"](), output_dir=str(tmp_path)))
    assert record.hw_decoder_load() is None
    before_it_was_timed = {"run": {"data": {"hw_decoder_load": 0.3, "num_threads": 2}}}
    for content, load in (
        (before_it_was_timed, 0.3),
        (before_it_was_timed | {"decoder": {"num_threads": 8, "hw_decoder_load": 0.12}}, 0.12),
    ):
        record.config_path.write_text(json.dumps(content))
        assert record.hw_decoder_load() == load
