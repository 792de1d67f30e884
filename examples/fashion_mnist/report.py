"""Table and plot of the Fashion-MNIST comparison."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.fashion_mnist.spread import deviation, in_percent
from megatron_nepa.benchmarks.machine import cpu_name
from megatron_nepa.training.reporting.plot_style import BLUE, GREY, STYLE, save_figure

Result = tuple[int, bool, float]  # per cent of the labels, whether pre-trained, accuracy


def write_report(results: Sequence[Result], folder: Path, minutes: float) -> None:
    """Write results.json, table.md and accuracy.png, and print the table.

    Args:
        results: of all trainings.
        folder: that exists.
        minutes: that the whole took.
    """
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": cpu_name(),
        "minutes": round(minutes, 1),
        "results": [{"percent": p, "pretrained": start, "accuracy": value} for p, start, value in results],
    }
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    table = format_table(results)
    (folder / "table.md").write_text(table + "\n")
    draw(results, folder / "accuracy.png")
    print(f"{table}\n\n{minutes:.0f} minutes; {folder}/results.json, table.md, accuracy.png")


def format_table(results: Sequence[Result]) -> str:
    """A Markdown table: mean and sample standard deviation of the seeds, in per cent."""
    lines = ["| labels | from scratch | NEPA, then fine-tuned | gain |", "|---|---|---|---|"]
    for percent in sorted({percent for percent, _, _ in results}):
        scratch, pretrained = (_accuracies(results, percent, start) for start in (False, True))
        cells = [in_percent(float(np.mean(values)), deviation(values)) for values in (scratch, pretrained)]
        gain = 100 * (np.mean(pretrained) - np.mean(scratch))
        lines.append(f"| {percent} % ({600 * percent:,}) | {cells[0]} | {cells[1]} | {gain:+.2f} |")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """Every accuracy over the share of labels, with the means joined."""
    percents = sorted({percent for percent, _, _ in results})
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for start, colour, name in ((True, BLUE, "NEPA, then fine-tuned"), (False, GREY, "from scratch")):
            means = [100 * np.mean(_accuracies(results, percent, start)) for percent in percents]
            axes.plot(percents, means, color=colour, linewidth=1.8, label=name)
            for percent in percents:
                values = 100 * np.array(_accuracies(results, percent, start))
                axes.plot([percent] * len(values), values, ".", color=colour, markersize=8, alpha=0.7)
        axes.set_xscale("log")
        axes.set_xticks(percents, [f"{percent} %\n{600 * percent:,}" for percent in percents])
        axes.minorticks_off()
        axes.set(
            title="Fashion-MNIST: what pre-training without labels is worth",
            xlabel="labels used for training",
            ylabel="test accuracy, %",
        )
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path)


def _accuracies(results: Sequence[Result], percent: int, pretrained: bool) -> list[float]:
    return [value for p, start, value in results if (p, start) == (percent, pretrained)]
