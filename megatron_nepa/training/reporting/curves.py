"""Loss and health curves of a run as PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from megatron_nepa.training.reporting.metric_display import METRICS, sources_of
from megatron_nepa.training.reporting.metrics_file import read_metrics
from megatron_nepa.training.reporting.plot_style import BLUE, GREY, ORANGE, STYLE, save_figure

Array = NDArray[np.float64]

SIZE_OF_A_FEW = 60  # up to so many rows each one is marked by a dot


class Series(NamedTuple):
    """The steps at which a metric was logged, and its values there, nan where it was not finite."""

    step: Array
    value: Array


class Panel(NamedTuple):
    """One plot among several: its title, what its y axis shows, and the metrics in it with their names and colours."""

    title: str
    unit: str
    curves: tuple[tuple[str, str, str], ...]


def panels_of(figure: str) -> tuple[Panel, ...]:
    """The plots of a figure's file, in the order of the table of metrics."""
    plotted = [metric for metric in METRICS if metric.panel and metric.figure == figure]
    titles = dict.fromkeys(metric.panel for metric in plotted)
    panels = []
    for title in titles:
        own = [metric for metric in plotted if metric.panel == title]
        colours = (BLUE, ORANGE, GREY)[: len(own)] if len(own) > 1 else (GREY,)
        curves = tuple((metric.name, metric.curve, colour) for metric, colour in zip(own, colours, strict=True))
        panels.append(Panel(title, own[0].unit, curves))
    return tuple(panels)


def panels_of_sources(metrics: Iterable[str]) -> tuple[Panel, ...]:
    """The plots of a mixture: loss and passes of each source; none of a run on one set."""

    def curves(metric: str) -> tuple[tuple[str, str, str], ...]:
        sources = sorted(sources_of(metrics, metric))
        return tuple((f"{metric}/{name}", name, f"C{i}") for i, name in enumerate(sources))

    panels = Panel("Loss by source", "loss", curves("loss")), Panel("Passes by source", "passes", curves("epoch"))
    return panels if panels[0].curves else ()


def draw_figures(metrics_path: Path, figures_dir: Path) -> list[Path]:
    """Draw a run's metrics.jsonl: loss.png (loss and learning rate), health.png (embeddings and gradient), of a run
    that was evaluated or probed evaluation.png, and of one on a mixture sources.png.

    A value that was not finite leaves a gap; a metric that was never logged is left out. Each file is replaced in one
    piece.

    Args:
        metrics_path: the metrics.jsonl.
        figures_dir: folder of the figures, made where it is missing.

    Returns:
        The files that were drawn; none where the metrics hold nothing to draw.
    """
    rows = read_metrics(metrics_path)
    metrics = {key: _series(rows, key) for key in {key for row in rows for key in row}}
    metrics = {key: series for key, series in metrics.items() if np.isfinite(series.value).any()}
    figures_dir.mkdir(parents=True, exist_ok=True)
    drawn = []
    with rc_context(STYLE):  # type: ignore[arg-type]
        if "loss" in metrics:
            drawn.append(save_figure(_loss_figure(metrics), figures_dir / "loss.png"))
        files = [(f"{figure}.png", panels_of(figure)) for figure in ("health", "evaluation")]
        for name, every in (*files, ("sources.png", panels_of_sources(metrics))):
            panels = [panel for panel in every if any(key in metrics for key, _, _ in panel.curves)]
            if panels:
                drawn.append(save_figure(_panel_figure(metrics, panels), figures_dir / name))
    return drawn


def _loss_figure(metrics: dict[str, Series]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    has_lr = "lr" in metrics
    axes = figure.subplots(1 + has_lr, 1, sharex=True, squeeze=False, height_ratios=(4, 1)[: 1 + has_lr])[:, 0]
    loss = metrics["loss"]
    _curve(axes[0], loss, BLUE)
    last = np.flatnonzero(np.isfinite(loss.value))[-1]
    title = f"Loss: {smooth(loss.value)[last]:.4f} at step {loss.step[last]:.0f}"
    axes[0].set(title=title + (" (smoothed)" if len(loss.step) > SIZE_OF_A_FEW else ""), ylabel="loss")
    if has_lr:
        rate = metrics["lr"]
        axes[1].plot(rate.step, rate.value, color=GREY, linewidth=1.5, marker=_marker(rate))
        axes[1].set(ylabel="learning rate", ylim=(0, 1.15 * np.nanmax(rate.value) or 1))
        axes[1].yaxis.set_major_locator(MaxNLocator(3))
        axes[1].yaxis.set_major_formatter(_scientific())
    _finish(axes[-1], loss)
    return figure


def _panel_figure(metrics: dict[str, Series], panels: list[Panel]) -> Figure:
    columns = min(len(panels), 2)
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * num_rows), layout="constrained")
    every = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axes, panel in zip(every, panels, strict=False):
        present = [curve for curve in panel.curves if curve[0] in metrics]
        shown = np.concatenate([metrics[key].value for key, _, _ in present])
        shown = shown[np.isfinite(shown)]
        log = bool(shown.min() > 0 and shown.max() > 30 * np.median(shown))  # a few spikes would flatten the rest
        for key, name, colour in present:
            _curve(axes, metrics[key], colour, name, log)
        if log:
            axes.set_yscale("log")
        elif shown.min() >= 0:
            axes.set_ylim(0, 1.1 * shown.max() or 1)
        axes.set(title=panel.title, ylabel=panel.unit)
        if len(present) > 1:
            axes.legend(loc="best", fontsize=9, handlelength=1.4)
        _finish(axes, metrics[present[0][0]])
    for axes in every[len(panels) :]:
        axes.remove()
    return figure


def _series(rows: list[dict[str, Any]], key: str) -> Series:
    pairs = [(row["step"], row[key]) for row in rows if key in row]
    values = [float(value) if isinstance(value, int | float) else np.nan for _, value in pairs]
    return Series(np.array([step for step, _ in pairs], dtype=float), np.array(values))


def _curve(axes: Axes, series: Series, colour: str, name: str = "", log: bool = False) -> None:
    step, value = series
    if len(step) <= SIZE_OF_A_FEW:
        axes.plot(step, value, color=colour, linewidth=1.6, marker=_marker(series), label=name)
    else:
        axes.plot(step, value, color=colour, linewidth=0.7, alpha=0.3)
        smoothed = np.exp(smooth(np.log(value))) if log else smooth(value)
        axes.plot(step, smoothed, color=colour, linewidth=1.8, label=name)


def smooth(values: Array) -> Array:
    """Centred moving average over 4 % of the values, twice; nan neither spreads nor is filled.

    A run's few values (:data:`SIZE_OF_A_FEW`) are returned as they are.
    """
    if len(values) <= SIZE_OF_A_FEW:
        return values
    reach = len(values) // 50
    index = np.arange(len(values))
    # the window shrinks towards the ends on both sides, so that a slope is not bent there
    half = np.minimum(reach, np.minimum(index, index[::-1]) + reach // 4)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    for _ in range(2):
        known = np.isfinite(values)
        total = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
        count = np.concatenate(([0], np.cumsum(known)))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (total[last] - total[first]) / (count[last] - count[first])
        values = np.where(known, mean, np.nan)
    return values


def _finish(axes: Axes, series: Series) -> None:
    first, last = series.step.min(), series.step.max()
    margin = 0.02 * (last - first) or 1.0  # a single step stands in the middle
    axes.set(xlabel="optimizer step", xlim=(first - margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _marker(series: Series) -> str | None:
    return "." if len(series.step) <= SIZE_OF_A_FEW else None


def _scientific() -> ScalarFormatter:
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-2, 3))
    return formatter
