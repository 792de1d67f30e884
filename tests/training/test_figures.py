"""Figures of a run: drawn whatever the metrics hold, and true to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from megatron_nepa.training.reporting.curves import draw_figures, smooth


def row(step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "loss": -0.9 + 1.0 / step,
        "grad_norm": 0.4 + 1.0 / step,
        "lr": 1e-4 * step,
        "target_std": 0.9,
        "target_effective_rank": 30.0 + step % 3,
        "prediction_std": 0.5,
        "prediction_effective_rank": 20.0,
        "prediction_norm": 5.0,
        "target_norm": 2.0,
    }
    return {**values, **changes}


def draw(folder: Path, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Pictures by file name, [height, width, channels]."""
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in rows))
    drawn = draw_figures(metrics, folder / "figures")
    assert sorted(drawn) == sorted((folder / "figures").iterdir())  # and nothing half-written beside
    return {path.name: matplotlib.image.imread(path) for path in drawn}


def pixels(picture: np.ndarray, colour: str) -> int:
    """How many pixels have the colour "#rrggbb"; the edges of grey text give fewer than 200 of a curve's grey."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.01).sum())


BLUE, ORANGE, GREY = "#2563a8", "#d9730d", "#6b7280"


@pytest.mark.parametrize("count", [2, 300])
def test_every_curve_is_drawn(count: int, tmp_path: Path) -> None:
    pictures = draw(tmp_path, [row(step) for step in range(1, count + 1)])
    assert set(pictures) == {"loss.png", "health.png"}
    assert pixels(pictures["loss.png"], BLUE) > 500
    assert pixels(pictures["loss.png"], GREY) > 500
    assert pixels(pictures["loss.png"], ORANGE) == 0
    assert all(pixels(pictures["health.png"], colour) > 500 for colour in (BLUE, ORANGE, GREY))


def test_a_mixture_has_a_figure_of_its_sources(tmp_path: Path) -> None:
    """A curve for each, of losses that may be negative, also where a step shows no sample of one."""
    rows = []
    for step in range(1, 21):
        rows.append(row(step, **{"loss/a": -0.8 - step / 100, "epoch/a": step / 10, "epoch/b": step / 50}))
        if step % 3:
            rows[-1]["loss/b"] = -0.5 - step / 100
    picture = draw(tmp_path, rows)["sources.png"]
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    for half in (left, right):
        assert all(pixels(half, colour) > 300 for colour in ("#1f77b4", "#ff7f0e"))


def test_evaluations_and_probes_have_a_figure(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 101)]
    for step in range(10, 101, 10):
        rows[step - 1] |= {"probe_knn_top1": 0.1 + step / 200, "val_top1": 0.2, "val_ema_top1": 0.5}
    pictures = draw(tmp_path, rows)
    assert set(pictures) == {"loss.png", "health.png", "evaluation.png"}
    assert pixels(pictures["evaluation.png"], BLUE) > 500
    assert pixels(pictures["evaluation.png"], ORANGE) > 300


def test_a_single_step_is_a_dot(tmp_path: Path) -> None:
    pictures = draw(tmp_path, [row(1)])
    assert 10 < pixels(pictures["loss.png"], BLUE) < 100
    assert pixels(pictures["health.png"], ORANGE) > 30


def test_missing_values_and_metrics(tmp_path: Path) -> None:
    """Lost steps, health on every tenth row only, a gradient spike, and a line that was cut."""
    rows = [row(step) for step in range(1, 101)]
    rows[40] |= {"loss": None, "grad_norm": None}
    rows[70] |= {"grad_norm": 1e4}
    for k, line in enumerate(rows):
        if k % 10:
            del line["target_effective_rank"], line["prediction_effective_rank"]
    pictures = draw(tmp_path, rows)
    assert all(pixels(pictures["health.png"], colour) > 500 for colour in (BLUE, ORANGE, GREY))
    height = pictures["health.png"].shape[0]

    few = draw(tmp_path, [{"step": step, "loss": -0.1, "grad_norm": 1.0} for step in range(1, 5)])
    assert few["health.png"].shape[0] < 0.6 * height  # one panel instead of four
    assert pixels(few["loss.png"], BLUE) > 500
    assert pixels(few["loss.png"], GREY) < 200  # there was no learning rate


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw(tmp_path, []) == {}
    assert draw(tmp_path, [{"step": 1, "loss": None}]) == {}


def test_smoothing() -> None:
    line = np.linspace(0.0, 1.0, 500)
    noise = np.random.default_rng(0).normal(scale=0.1, size=500)
    smoothed = smooth(line + noise)
    assert np.abs(smoothed - line).max() < 0.1
    assert np.abs(smoothed - line).std() < 0.3 * noise.std()
    np.testing.assert_allclose(smooth(line), line, atol=0.01)  # follows a slope without a lag
    holed = line.copy()
    holed[200:210] = np.nan
    assert np.array_equal(np.isnan(smooth(holed)), np.isnan(holed))
    assert np.array_equal(smooth(line[:60]), line[:60])
