"""The study's figures: the curves of the paper's figure 3."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.ablations.cells import Pretraining, frozen
from examples.ablations.study import Study
from examples.ablations.tables import Flags
from megatron_nepa.training.reporting.plot_style import BLUE, ORANGE, STYLE, save_figure


class _Panel(NamedTuple):
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


def pretrainings(study: Study) -> list[Pretraining]:
    """What the figures show: each variant with the first seed."""
    return [_start(study, flags) for panel in PANELS for _, flags in panel.shown]


def draw_figures(study: Study, folder: Path) -> list[tuple[str, str]]:
    """Draw what was trained; title and file name of each figure."""
    known = study.results.pretrainings
    if any(start.key not in known for start in pretrainings(study)):
        return []
    with rc_context(STYLE):
        figure = Figure(figsize=(11.0, 3.0), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for (label, flags), colour in zip(panel.shown, (BLUE, ORANGE), strict=True):
                curves = known[_start(study, flags).key]["curves"]
                axes.plot(curves["step"], curves[panel.curve], color=colour, linewidth=1.4, label=label)
            axes.set(title=panel.title, xlabel="step", ylabel=panel.axis)
            if panel.log:
                axes.set_yscale("log")
            axes.legend()
        save_figure(figure, folder / "curves.png")
    return [("Figure 3: pre-training with and without each component", "curves.png")]


def _start(study: Study, flags: Flags) -> Pretraining:
    return Pretraining("nepa", frozen(flags), study.steps, study.scale.seeds[0])
