"""The picture of a data set: its first samples, and how its sizes and classes are spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_nepa.analysis.data_summary import DataSummary
from megatron_nepa.analysis.preview import Sample
from megatron_nepa.training.reporting.plot_style import BLUE, GREY, ORANGE, STYLE, save_figure

_STYLE: dict[Any, Any] = {**STYLE, "axes.titlesize": 10}
_ACROSS = 4  # samples in a row
_TILE = 1.75  # inches
_CAPTION, _HEADLINE, _PLOTS = 0.42, 0.75, 2.6  # inches
_MOST_LETTERS = 44  # of a caption's line
_MOST_BARS = 40  # classes that are drawn one by one


def draw_sheet(path: Path, samples: Sequence[Sample], summary: DataSummary, title: str) -> None:
    """Draw every sample, stored and as the model sees it, and below them the set's figures.

    Args:
        path: PNG file, replaced in one piece.
        samples: the first of the run.
        summary: of the whole set.
        title: two lines, the first bold.
    """
    rows = -(-len(samples) // _ACROSS)
    heights = [_HEADLINE, rows * (_TILE + _CAPTION), _PLOTS]
    with rc_context(_STYLE):
        figure = Figure(figsize=(_ACROSS * 2 * _TILE + 0.6, sum(heights)), layout="constrained")
        top, middle, bottom = cast("list[SubFigure]", figure.subfigures(3, 1, height_ratios=heights))
        bold, plain = title.split("\n")
        top.text(0.01, 0.85, bold, va="top", fontsize=13, fontweight="bold")
        top.text(0.01, 0.38, plain, va="top", fontsize=9, color=GREY)
        grid = middle.add_gridspec(rows, _ACROSS * 2, wspace=0.03)
        for place, sample in enumerate(samples):
            row, column = divmod(place, _ACROSS)
            stored = middle.add_subplot(grid[row, 2 * column])
            _draw_stored(stored, sample)
            _picture(middle.add_subplot(grid[row, 2 * column + 1]), sample.seen)
            stored.set_title(_caption(sample), fontsize=7.5, fontweight="normal", linespacing=1.3)
        axes = bottom.subplots(1, 3)
        _draw_sizes(axes[0], summary)
        _draw_bytes(axes[1], summary)
        _draw_classes(axes[2], summary)
        save_figure(figure, path)


def _caption(sample: Sample) -> str:
    name = sample.name if len(sample.name) <= _MOST_LETTERS else "..." + sample.name[3 - _MOST_LETTERS :]
    target = sample.target if len(sample.target) <= _MOST_LETTERS else sample.target[: _MOST_LETTERS - 3] + "..."
    height, width = sample.original.shape[:2]
    # a dollar sign would begin a formula
    return f"{sample.number}: {name} ({width} x {height})\n{target or 'no label'}".replace("$", r"\$")


def _draw_stored(axes: Axes, sample: Sample) -> None:
    _picture(axes, sample.original)
    if sample.box is not None:
        x, y, width, height = sample.box
        line: dict[str, Any] = {"fill": False, "clip_on": False}
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, edgecolor="white", linewidth=2.2, **line))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, edgecolor=ORANGE, linewidth=1.2, **line))


def _picture(axes: Axes, pixels: npt.NDArray[np.uint8]) -> None:
    axes.imshow(pixels)
    axes.set_anchor("NW")
    axes.set_axis_off()


def _draw_sizes(axes: Axes, summary: DataSummary) -> None:
    shorter = np.minimum(summary.width, summary.height)
    _histogram(axes, shorter, summary.image_size)
    axes.axvline(summary.image_size, color=ORANGE, linewidth=1.5)
    share = (shorter < summary.image_size).mean()
    axes.set_title(f"shorter side: {share:.1%} below the crops of {summary.image_size}")
    axes.set_xlabel("pixels")


def _draw_bytes(axes: Axes, summary: DataSummary) -> None:
    _histogram(axes, np.maximum(summary.size / 1e3, 1e-3))
    axes.set_title(f"encoded size: {summary.size.mean() / 1e3:,.3g} kB on average")
    axes.set_xlabel("kB")


def _histogram(axes: Axes, values: npt.NDArray[np.number], reach: float | None = None) -> None:
    """Of values over their range, widened to ``reach``."""
    every = values if reach is None else np.append(values, reach)
    low, high = float(every.min()), float(every.max())
    if high > 20 * low:  # a few orders of magnitude
        bins = np.geomspace(low, high, 40)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        bins = np.linspace(low - 0.5, high + 0.5, 40)
    axes.hist(values, bins=bins.tolist(), color=BLUE)
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_classes(axes: Axes, summary: DataSummary) -> None:
    if not len(summary.per_class):
        axes.set_axis_off()
        axes.set_title("no labels" if summary.unlabelled == summary.looked_at else "classes of several sets")
        return
    counts = np.sort(summary.per_class)[::-1]
    places = np.arange(1, len(counts) + 1)
    if len(counts) <= _MOST_BARS:
        axes.bar(places, counts, color=BLUE)
    else:
        axes.fill_between(places, counts, color=BLUE, linewidth=0)
    axes.set_ylim(0, 1.08 * max(int(counts[0]), 1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    smallest, largest = int(counts[-1]), int(counts[0])
    ratio = f"{largest / smallest:.3g} times the smallest" if smallest else "one has none"
    axes.set_title(
        f"{len(counts):,} classes: the largest is {ratio}" if smallest else f"{len(counts):,} classes: {ratio}"
    )
    axes.set_xlabel("classes, largest first")
    axes.set_ylabel("images")
