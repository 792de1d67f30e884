"""The suite: rows are run, figures land on the page, what was not measured stays empty."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nepa.benchmarks import suite
from megatron_nepa.benchmarks.results_page import (
    Entry,
    describe_data,
    describe_forms,
    describe_index,
    describe_kernels,
    describe_order,
    read_results,
    render_page,
)
from megatron_nepa.benchmarks.suite import ENTRIES, TOOLS
from megatron_nepa.config import ConfigError

TRAIN: dict[str, Any] = {
    "contests": [
        {
            "name": "megatron_nepa",
            "images_per_step": 8,
            "times": [{"seconds": 1.0}, {"seconds": 2.0}],
            "images_per_second": 6.0,
            "tflops_per_device": 0.81,
            "share_of_matmul": 0.6,
            "peak_memory_gb": 4.0,
            "first_over_this": 1.0,
        },
        {"name": "  other", "first_over_this": 1.25, "peak_memory_gb": 5.0},
    ],
    "rounds": "2 rounds",
    "share_of_ceiling": 0.9,
    "dtype": "bf16",
}


def test_the_page_in_the_repository_is_what_its_figures_give() -> None:
    page = TOOLS / "RESULTS.md"
    assert page.read_text() == render_page(ENTRIES, read_results(page.with_suffix(".json")))


def test_a_measured_row_is_filled_and_the_others_stay_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "measure", lambda entry: TRAIN)
    page = tmp_path / "page.md"
    suite.run(argparse.Namespace(only="cpu_b", page=str(page)))
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.endswith("` |")]
    assert len(rows) == len(ENTRIES)
    filled = [row for row in rows if row[1].strip()]
    assert len(filled) == 1
    assert filled[0][0] == "| NEPA-B, release recipe, batch 8"
    assert "bf16: 6 images/s (4 to 8; 2 rounds)" in filled[0][1]
    assert "1.25x other (peak 5.00 GB)" in filled[0][1]
    assert torch.__version__ in filled[0][2]
    # a second row keeps the first
    suite.run(argparse.Namespace(only="cpu_quickstart", page=str(page)))
    assert set(json.loads(page.with_suffix(".json").read_text())) == {"cpu_b", "cpu_quickstart"}


def test_a_row_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(entry: Entry) -> dict[str, Any]:
        if entry.name == "cpu_b":
            raise RuntimeError("out of memory")
        return TRAIN

    monkeypatch.setattr(suite, "measure", measure)
    page = tmp_path / "page.md"
    suite.run(argparse.Namespace(only="cpu_b,cpu_quickstart", page=str(page)))
    assert set(read_results(page.with_suffix(".json"))) == {"cpu_quickstart"}
    assert "cpu_b failed: out of memory" in capsys.readouterr().err


def test_a_command_that_fails_is_told_by_its_last_line() -> None:
    with pytest.raises(RuntimeError, match="--operations gelu is unknown"):
        suite.measure(Entry("x", "x", "cpu", ("kernels", "--operations", "gelu")))


def test_rows_of_another_machine_are_refused() -> None:
    cpu = torch.device("cpu")
    assert {entry.device for entry in suite.choose(None, cpu)} == {"cpu"}
    with pytest.raises(ConfigError, match="row for cuda"):
        suite.choose("gpu_b", cpu)
    with pytest.raises(ConfigError, match="unknown"):
        suite.choose("x", cpu)


def test_damaged_figures_are_named(tmp_path: Path) -> None:
    (tmp_path / "page.json").write_text('{"cpu_b": {"figures": ""}}')
    with pytest.raises(ConfigError, match="does not hold the results"):
        read_results(tmp_path / "page.json")


def test_kernels_and_data_have_figures() -> None:
    timings = [
        {"operation": "swiglu", "contender": "eager", "total_ms": 2.0},
        {"operation": "swiglu", "contender": "triton", "total_ms": 1.0},
        {"operation": "swiglu", "contender": "broken", "total_ms": None},
    ]
    assert describe_kernels({"timings": timings}) == "swiglu: triton 1 ms, eager 2 ms"
    report = {"images_per_second": {"tar shards": 800.4}, "ratio": {"Arrow": 1.0691}, "cpu_ratio": {"Arrow": 1.01}}
    assert describe_forms(report) == "tar shards 800 images/s; of that (a second of CPU time) Arrow 1.069x (1.010x)"
    report = {"images_per_second_per_core": 240.4, "ratio": {"torchvision": 1.3}}
    assert describe_data(report) == "240 images/s a core as uint8; 1.30x torchvision"
    report = {
        "timings": [
            {
                "images": 10**9,
                "microseconds": 95.6,
                "peak_mb": 0.031,
            }
        ]
    }
    assert describe_order(report) == "1,000,000,000 images: 96 us a batch, 0.031 MB at most"
    report = {
        "timings": [
            {
                "images": 10**9,
                "open_ms": 9.96,
                "first_ms": 21.5,
                "images_per_second": 20123.4,
                "mb_per_second": 402.1,
                "batches": 10_000,
                "settled_mb": 211.6,
                "peak_mb": 213.2,
            }
        ]
    }
    assert describe_index(report) == (
        "1,000,000,000 images: opened in 9.96 ms, first batch after 21.5 ms, 20,123 images/s (402 MB/s); process of "
        "212 MB after 500 batches, 213 MB at most up to 10,000"
    )
