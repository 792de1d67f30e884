"""How every figure of the project looks, and how it is written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from megatron_nepa.files import whole_or_absent

BLUE, ORANGE, GREY = "#2563a8", "#d9730d", "#6b7280"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG file in one piece; returns ``path``."""
    with whole_or_absent(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return path
