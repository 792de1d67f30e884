"""Figures of one image: the paper's triplets (figure 5), every prediction, and the evolution in training (figure 7)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from numpy.typing import NDArray

from megatron_nepa.analysis.images import Pixels
from megatron_nepa.analysis.maps import Heads, Maps
from megatron_nepa.analysis.panels import (
    Scale,
    attention_scale,
    cosine_scale,
    draw_colour_bar,
    draw_image,
    draw_map,
    mark,
    mark_legend,
    signed_scale,
)
from megatron_nepa.training.reporting.plot_style import GREY, STYLE, save_figure

_PANEL = 2.3  # longer side of a panel, inches
_NARROWEST, _WIDEST = 3 * _PANEL, 18.0  # of a figure, inches
_HEADLINE, _LEGEND, _BARS = 0.55, 0.3, 0.6  # heights, inches
_HEADLINE_STYLES: tuple[dict[str, Any], ...] = ({"fontsize": 11, "fontweight": "bold"}, {"fontsize": 9, "color": GREY})
_STYLE: dict[Any, Any] = {**STYLE, "axes.grid": False, "axes.titleweight": "normal"}
_MOST_COLUMNS = 7
_SIMILARITY = "similarity (cosine of the prediction and each patch)"


class _Panel(NamedTuple):
    """One picture of a figure: the image itself, or a map over it."""

    title: str
    values: NDArray[Any] | None = None
    scale: Scale | None = None
    query: int | None = None


def draw_triplets(
    path: Path, maps: Maps, pixels: Pixels, patch_size: int, layers: Sequence[int], heads: Heads, headline: str
) -> None:
    """Draw each query's triplet: the query patch, its attention, the similarity of its prediction to every patch.

    Args:
        path: PNG file.
        maps: the image's maps.
        pixels: the image, [H, W, 3].
        patch_size: side of a patch, pixels.
        layers, heads: as in :meth:`Maps.relative_attention`; ``each`` draws one attention panel a head.
        headline: two lines at the top, the first bold.
    """
    attention = maps.relative_attention(layers, heads)  # [Q, K, R, C]
    scales = attention_scale([attention]), cosine_scale([maps.similarity], _SIMILARITY)
    blocks = _query_panels(maps, layers, heads, *scales)
    if heads == "each":
        wrapped = -(-len(blocks[0]) // -(-len(blocks[0]) // _MOST_COLUMNS))  # rows of equal length
        rows = [block[start : start + wrapped] for block in blocks for start in range(0, len(block), wrapped)]
    else:
        abreast = _triplets_abreast(len(blocks))
        rows = [list(chain(*blocks[start : start + abreast])) for start in range(0, len(blocks), abreast)]
    _draw(path, rows, maps, pixels, patch_size, headline)


def draw_predictions(path: Path, maps: Maps, pixels: Pixels, patch_size: int, headline: str) -> None:
    """Draw how well every patch's embedding was predicted, and how much better than by repeating the patch before.

    The arguments are those of :func:`draw_triplets`.
    """
    gain = maps.next_cosine - maps.repeat_cosine
    cosine = cosine_scale([maps.next_cosine], "cosine of each patch's embedding and its prediction")
    signed = signed_scale([gain], "that cosine, less that of repeating the patch before")
    row = [
        _Panel("image"),
        _Panel(f"prediction (mean {np.nanmean(maps.next_cosine):.3f})", maps.next_cosine, cosine),
        _Panel(f"gain (mean {np.nanmean(gain):+.3f})", gain, signed),
    ]
    _draw(path, [row], maps, pixels, patch_size, headline)


def draw_evolution(
    path: Path,
    maps: dict[int, Maps],
    pixels: Pixels,
    patch_size: int,
    layers: Sequence[int],
    heads: Heads,
    headline: str,
) -> None:
    """Draw one row a checkpoint with the same image and queries; colours mean the same in every row.

    Args:
        maps: by optimizer step.
        path, pixels, patch_size, layers, heads, headline: as in :func:`draw_triplets`.
    """
    scales = (
        attention_scale([found.relative_attention(layers, heads) for found in maps.values()]),
        cosine_scale([found.similarity for found in maps.values()], _SIMILARITY),
    )
    blocks = [_query_panels(found, layers, heads, *scales) for found in maps.values()]
    images = [block[0] for block in blocks[0]]
    rows = [list(chain(*(block[1:] for block in of_step))) for of_step in blocks]
    some = next(iter(maps.values()))
    labels = [f"step {step}\nmean cosine {np.nanmean(found.next_cosine):.3f}" for step, found in maps.items()]
    _draw(path, rows, some, pixels, patch_size, headline, images, labels)


def _query_panels(
    maps: Maps, layers: Sequence[int], heads: Heads, of_attention: Scale, of_cosine: Scale
) -> list[list[_Panel]]:
    """For each query: the image, one attention panel or one a head, the similarity."""
    attention, bos = maps.relative_attention(layers, heads), maps.bos_share(layers, heads)
    blocks = []
    for query, (y, x) in enumerate(maps.queries):
        next_y, next_x = maps.next_patch(query)
        block = [_Panel(f"query {y},{x}: predicts {next_y},{next_x}", query=query)]
        for head, values in enumerate(attention[query]):
            title = f"head {head}" if heads == "each" else "attention"
            title += f" ({100 * bos[query, head]:.0f} % on BOS)" if maps.bos_token else ""
            block.append(_Panel(title, values, of_attention, query))
        cosine = maps.similarity[query, next_y, next_x]
        block.append(_Panel(f"similarity (next: {cosine:.2f})", maps.similarity[query], of_cosine, query))
        blocks.append(block)
    return blocks


def _triplets_abreast(count: int) -> int:
    """How many triplets stand in a row, so that the figure is about square and, where possible, full."""
    least = max(1, round((count / 3) ** 0.5))
    return next((number for number in (least, least + 1) if count % number == 0), least)


def _draw(
    path: Path,
    rows: list[list[_Panel]],
    maps: Maps,
    pixels: Pixels,
    patch_size: int,
    headline: str,
    header: Sequence[_Panel] = (),
    labels: Sequence[str] = (),
) -> None:
    """Draw rows of panels with a colour bar for each scale, under a row of ``header`` images; ``labels`` name rows."""
    columns, num_rows = len(rows[0]), len(rows) + bool(header)
    width = min(max(_PANEL, _NARROWEST / columns), _WIDEST / columns)
    height = width * min(pixels.shape[0] / pixels.shape[1], 2.0)
    has_marks = rows[0][-1].query is not None
    heights = (_HEADLINE + _LEGEND * has_marks, num_rows * (height + 0.25), _BARS)
    with rc_context({**_STYLE, "axes.titlesize": 9 * min(width / _PANEL, 1)}):
        figure = Figure((columns * width + 0.3 * bool(labels), sum(heights)), layout="constrained")
        top, middle, bottom = cast("list[SubFigure]", figure.subfigures(3, 1, height_ratios=heights))
        for line, (text, style) in enumerate(zip(headline.split("\n"), _HEADLINE_STYLES, strict=True)):
            _fit(top.text(0.01, 1 - (0.08 + 0.24 * line) / heights[0], text, va="top", **style), figure)
        if has_marks:
            mark_legend(top, maps.causal, loc="lower left", bbox_to_anchor=(0.0, -0.05), ncols=3, borderpad=0.2)
        grid = middle.add_gridspec(num_rows, columns)
        span = columns // max(len(header), 1)
        for i, panel in enumerate(header):
            _fill(middle.add_subplot(grid[0, i * span : (i + 1) * span]), panel, maps, pixels, patch_size)
        bars: dict[str, tuple[Scale, Any]] = {}
        for i, row in enumerate(rows):
            for j, panel in enumerate(row):
                axes = middle.add_subplot(grid[i + bool(header), j])
                drawn = _fill(axes, panel, maps, pixels, patch_size)
                if panel.scale is not None:
                    bars[panel.scale.label] = panel.scale, drawn
                if j == 0 and labels:
                    axes.set_ylabel(labels[i])
        for axes, (scale, drawn) in zip(bottom.subplots(1, len(bars), squeeze=False)[0], bars.values(), strict=True):
            draw_colour_bar(bottom, axes, scale, drawn)
        save_figure(figure, path)


def _fill(axes: Axes, panel: _Panel, maps: Maps, pixels: Pixels, patch_size: int) -> Any:
    drawn = None
    if panel.values is None or panel.scale is None:
        draw_image(axes, pixels)
    else:
        drawn = draw_map(axes, panel.values, pixels, panel.scale)
    if panel.query is not None:
        mark(axes, maps, panel.query, patch_size)
    axes.set_title(panel.title)
    return drawn


def _fit(text: Text, figure: Figure) -> None:
    """Shrink a line that is longer than its figure."""
    length, room = text.get_window_extent().width, 0.94 * figure.bbox.width  # hinting changes with the resolution
    if length > room:
        text.set_fontsize(float(text.get_fontsize()) * room / length)
