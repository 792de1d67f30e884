"""The panels that every figure of an image is made of: the marked image, heat maps over its patches, colour bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from megatron_nepa.analysis.images import Pixels
from megatron_nepa.analysis.maps import Maps
from megatron_nepa.training.reporting.plot_style import ORANGE

BLANK = "#f3f4f6"
NEXT = "#22d3ee"
_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Scale(NamedTuple):
    """How numbers become colours, and the words and ticks at the colour bar."""

    label: str
    colours: str
    norm: Normalize
    extend: str = "neither"
    ticks: Sequence[float] | None = None


def attention_scale(values: Sequence[NDArray[Any]]) -> Scale:
    """Of attention relative to uniform attention; one patch in two hundred may lie beyond its top."""
    top = max(float(np.quantile(_known(values), 0.995)), 2.0)
    ticks = [tick for tick in _TICKS if tick <= top]
    # the root shows faint parts too
    return Scale("attention (1: as if spread evenly)", "magma", PowerNorm(0.5, 0.0, top), "max", ticks)


def cosine_scale(values: Sequence[NDArray[Any]], label: str) -> Scale:
    """Of cosines, over the range that they take; one patch in fifty may lie below it."""
    known = _known(values)
    return Scale(label, "viridis", Normalize(float(np.quantile(known, 0.02)), float(known.max())), "min")


def signed_scale(values: Sequence[NDArray[Any]], label: str) -> Scale:
    """Of differences, zero in the middle."""
    known = _known(values)
    limit = float(np.abs(known).max()) or 1.0
    return Scale(label, "RdBu", Normalize(-limit, limit))


def draw_image(axes: Axes, pixels: Pixels) -> None:
    """An image, in the coordinates of its pixels."""
    axes.imshow(pixels)
    _bare(axes)


def draw_map(axes: Axes, values: NDArray[Any], pixels: Pixels, scale: Scale) -> Any:
    """A heat map over the patches of an image, in the coordinates of its pixels; NaN stays blank.

    Returns:
        What a colour bar is made from.
    """
    height, width = pixels.shape[:2]
    colours = colormaps[scale.colours].with_extremes(bad=BLANK)
    drawn = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        norm=scale.norm,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
    _bare(axes)
    return drawn


def mark(axes: Axes, maps: Maps, query: int, patch_size: int) -> None:
    """Frame a query patch and the patch that it predicts."""
    thickness = min(1.6, 24 / max(maps.grid))
    inset = 0.06 * patch_size  # neighbours' frames stay apart
    for (y, x), colour in ((maps.next_patch(query), NEXT), (maps.queries[query], ORANGE)):
        corner = (x * patch_size - 0.5 + inset, y * patch_size - 0.5 + inset)
        side = patch_size - 2 * inset
        frame = Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=thickness, zorder=3)
        frame.set(path_effects=[withStroke(linewidth=thickness + 1.4, foreground="black")], clip_on=False)
        axes.add_patch(frame)


def mark_legend(figure: SubFigure, causal: bool, **where: Any) -> None:
    """Explain the frames and, in causal maps, the blank."""
    square: dict[str, Any] = {"marker": "s", "linestyle": "", "markersize": 9}
    handles = [
        Line2D([], [], mec=ORANGE, mfc="none", mew=2, label="query patch", **square),
        Line2D([], [], mec=NEXT, mfc="none", mew=2, label="the next patch, which it predicts", **square),
        Line2D([], [], mec="#9ca3af", mfc=BLANK, mew=0.8, label="not seen by the query", **square),
    ]
    figure.legend(handles=handles if causal else handles[:2], fontsize=9, handletextpad=0.3, columnspacing=1.2, **where)


def draw_colour_bar(figure: SubFigure, axes: Axes, scale: Scale, drawn: Any) -> None:
    """The legend of a scale, in axes of its own."""
    bar = figure.colorbar(drawn, cax=axes, orientation="horizontal", extend=scale.extend, ticks=scale.ticks)
    bar.set_label(scale.label, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)


def _known(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    every = np.concatenate([np.ravel(part) for part in values])
    return every[np.isfinite(every)]


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
