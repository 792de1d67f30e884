"""The study's figures: the curves of the paper's figure 3."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.ablations.cells import Cell, Flags
from examples.ablations.study import Study
from examples.ablations.tables import Row
from megatron_nepa.training.reporting.plot_style import BLUE, ORANGE, STYLE, save_figure


class _Panel(NamedTuple):
    """Two variants, the one with the component first."""

    title: str
    curve: str
    axis: str
    shown: tuple[tuple[str, Flags], tuple[str, Flags]]
    log: bool = False


PANELS = (
    _Panel("shift", "loss", "loss", (("with", {}), ("without", {"objective.shift": "false"}))),
    _Panel("stop-gradient", "loss", "loss", (("with", {}), ("without", {"objective.stop_gradient": "false"}))),
    _Panel("LayerScale", "loss", "loss", (("with (0.1)", {"model.layer_scale_init": 0.1}), ("without", {}))),
    _Panel("QK-norm", "grad_norm", "gradient norm", (("with", {}), ("without", {"model.qk_norm": "none"})), log=True),
)


def cells(study: Study) -> list[Cell]:
    """What the figures are drawn from: each variant with the first seed, and its accuracy."""
    return [_cell(study, flags) for panel in PANELS for _, flags in panel.shown]


def describe_curves(study: Study, folder: Path) -> str:
    """Draw figure 3 and write its section; "" where not all of it was trained."""
    if not study.has(cells(study)):
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(11.0, 3.0), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for (label, flags), colour in zip(panel.shown, (BLUE, ORANGE), strict=True):
                curves = study.results.pretraining(_cell(study, flags).pretrained)["curves"]
                axes.plot(curves["step"], curves[panel.curve], color=colour, linewidth=1.4, label=label)
            axes.set(title=panel.title, xlabel="step", ylabel=panel.axis)
            if panel.log:
                axes.set_yscale("log")
            axes.legend()
        save_figure(figure, folder / "curves.png")
    title = "Figure 3: pre-training with and without each component"
    lines = [f"## {title}", "", f"![{title}](curves.png)", "", "| | with, % | without, % |", "|---|---|---|"]
    for panel in PANELS:
        found = study.accuracies(_cell(study, flags) for _, flags in panel.shown)
        lines.append(f"| {panel.title} | {' | '.join(f'{100 * accuracy:.2f}' for accuracy in found)} |")
    lines += [
        "",
        "Pre-training's curves of the first seed, and that seed's accuracy. For the shift the paper shows the accuracy "
        "of the average, this figure the loss: -1 is its least, reached without the shift as without the "
        "stop-gradient, and no merit, as the accuracies say. The trunk of the other panels has no "
        "LayerScale, the paper's has it.",
    ]
    return "\n".join(lines)


def _cell(study: Study, flags: Flags) -> Cell:
    return study.cell(Row("", "", flags), study.scale.seeds[0])
