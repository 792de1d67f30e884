"""A run on a mixture: its log by source is equal on every grid and after restarts, and changes are said or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from tests.data.range_server import serving
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain, read_metrics

STEPS = 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sets: crops of a photograph, and noise, whose loss is another."""
    root = tmp_path_factory.mktemp("sources")
    make_images(root / "crops", 20)
    (root / "noise,=1").mkdir()
    for i in range(7):
        noise = np.random.default_rng(i).integers(0, 256, (64, 80, 3), np.uint8)
        Image.fromarray(noise).save(root / "noise,=1" / f"{i}.png")
    return root


def run(
    output: Path, sources: Path, *more: str, ranks: int = 1, shares: tuple[float, float] = (0.7, 0.3)
) -> str | None:
    data = f"--data={sources}/crops={shares[0]},{sources}/noise,=1={shares[1]}"
    flags = [*TINY, data, f"--output_dir={output}", f"--steps={STEPS}", "--save_every=2", *more]
    said: str | None = run_ranks(ranks, pretrain, flags)[0]
    return said


@pytest.fixture(scope="module")
def serial(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank."""
    output = tmp_path_factory.mktemp("serial") / "run"
    assert run(output, sources) is None
    return output


def by_source(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "/" in name}


def test_the_log_has_loss_and_passes_by_source(serial: Path) -> None:
    rows = read_metrics(serial)
    assert len(rows) == STEPS
    drawn = {"crops": 0.0, "noise,=1": 0.0}
    for row in rows:
        assert set(by_source(row)) == {"loss/crops", "loss/noise,=1", "epoch/crops", "epoch/noise,=1"}
        # as many samples as the passes grew by have that loss on average
        count = {"crops": row["epoch/crops"] * 20, "noise,=1": row["epoch/noise,=1"] * 7}
        assert sum(count.values()) == pytest.approx(row["samples"])
        share = {name: (count[name] - drawn[name]) / 8 for name in count}
        assert sum(share[name] * row[f"loss/{name}"] for name in share) == pytest.approx(row["loss"], abs=1e-6)
        assert abs(row["loss/crops"] - row["loss/noise,=1"]) > 1e-3
        assert row["epoch"] == row["samples"] / 27
        drawn = count
    assert (serial / "figures" / "sources.png").is_file()


@pytest.mark.parametrize(
    ("ranks", "grid", "resumes"),
    [
        (2, ["--micro_batch_size=2"], False),
        (2, ["--tensor_parallel_size=2", "--sequence_parallel", "--micro_batch_size=1"], True),
        (4, ["--tensor_parallel_size=2", "--micro_batch_size=2"], True),
    ],
    ids=["DP", "SP that cuts samples, resumed", "DP x TP, resumed"],
)
def test_every_grid_and_restart_logs_the_same(
    serial: Path, sources: Path, tmp_path: Path, ranks: int, grid: list[str], resumes: bool
) -> None:
    resume = [f"--resume={serial / 'checkpoints' / 'step_00000002'}"] if resumes else []
    assert run(tmp_path / "run", sources, *grid, *resume, ranks=ranks) is None
    rows, expected = read_metrics(tmp_path / "run"), read_metrics(serial)[2 if resumes else 0 :]
    for row, other in zip(rows, expected, strict=True):
        assert by_source(row) == pytest.approx(by_source(other), abs=1e-6)
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)


OTHERS = {
    "aim_b": [],
    "mae_b": ["decoder_hidden_size=16", "decoder_layers=1", "decoder_heads=2", "decoder_mlp_hidden_size=24"],
    "jepa_b": ["predictor_hidden_size=16", "predictor_num_layers=1", "predictor_num_heads=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_other_objectives_log_losses_by_source_too(sources: Path, tmp_path: Path, recipe: str) -> None:
    """On one rank, and where rows cut a sample."""
    grids = {
        1: ["--micro_batch_size=8"],
        2: ["--tensor_parallel_size=2", "--sequence_parallel", "--micro_batch_size=1"],
    }
    plain = [flag for flag in TINY if "mask_ratio" not in flag and "micro_batch_size" not in flag]
    flags = [f"--recipe={recipe}", *plain, "--model.image_size=84", *(f"--objective.{flag}" for flag in OTHERS[recipe])]
    flags += [f"--data={sources}/crops=0.7,{sources}/noise,=1=0.3", f"--steps={STEPS}"]
    for ranks, grid in grids.items():
        assert run_ranks(ranks, pretrain, [*flags, *grid, f"--output_dir={tmp_path}/{ranks}"]) == [None] * ranks
    for row, other in zip(*(read_metrics(tmp_path / str(ranks)) for ranks in grids), strict=True):
        assert {"loss/crops", "loss/noise,=1"} <= set(row)
        assert by_source(row) == pytest.approx(by_source(other), abs=1e-5)
        assert row["loss/crops"] != row["loss/noise,=1"]


def test_changed_shares_go_on_in_another_folder_and_are_refused_in_the_same(
    serial: Path, sources: Path, tmp_path: Path
) -> None:
    said = run(serial, sources, shares=(0.4, 0.6))
    assert said is not None
    assert "crops has 7000 of 10000 samples there, 4000 here; noise,=1 has 3000 of 10000 samples there, 6000" in said
    assert said.startswith("ConfigError: --output_dir")
    checkpoint = serial / "checkpoints" / "step_00000002"
    assert run(tmp_path / "run", sources, f"--resume={checkpoint}", shares=(0.4, 0.6)) is None
    recorded = read_manifest(tmp_path / "run" / "checkpoints" / "step_00000004")["progress"]["mixture"]
    assert recorded["since"] == 16
    drawn = {source["name"]: source["drawn"] for source in recorded["sources"]}
    before = read_metrics(serial)[1]
    assert drawn == {"crops": round(before["epoch/crops"] * 20), "noise,=1": round(before["epoch/noise,=1"] * 7)}
    for row in read_metrics(tmp_path / "run"):
        assert row["epoch/crops"] >= before["epoch/crops"]
        assert row["epoch/noise,=1"] > before["epoch/noise,=1"]


def test_a_source_with_other_images_is_named(serial: Path, sources: Path, tmp_path: Path) -> None:
    """And sources that only moved are the same."""
    shutil.copytree(sources, tmp_path / "moved")
    assert run(serial, tmp_path / "moved") is None
    (tmp_path / "moved" / "noise,=1" / "3.png").unlink()
    said = run(serial, tmp_path / "moved")
    assert said is not None
    assert "holds a run on another mixture (noise,=1 holds other images)" in said
    config = json.loads((serial / "config.json").read_text())
    assert set(config["data_fingerprint"]) == {"crops", "noise,=1"}


def test_a_source_on_a_server_beside_a_local_one_shows_the_same_samples(
    serial: Path, sources: Path, tmp_path: Path
) -> None:
    """The run is that of two local folders, though the server fails now and then."""
    pytest.importorskip("aiohttp")
    write_shards(scan_folder(sources / "noise,=1"), tmp_path / "shards", 3, progress=False)
    index = tmp_path / "noise,=1"
    with serving(tmp_path / "shards", failing=0.1, short=0.1) as server:
        build_and_save_index(open_source(server.url), index, workers=1, progress=False)
        server.faults.ranges.clear()
        flags = [*TINY, f"--data={sources}/crops=0.7,{index}=0.3", f"--output_dir={tmp_path}/run"]
        assert run_ranks(1, pretrain, [*flags, f"--steps={STEPS}"]) == [None]
        assert server.faults.ranges
    for row, expected in zip(read_metrics(tmp_path / "run"), read_metrics(serial), strict=True):
        assert by_source(row) == by_source(expected)
        assert (row["loss"], row["grad_norm"]) == (expected["loss"], expected["grad_norm"])
