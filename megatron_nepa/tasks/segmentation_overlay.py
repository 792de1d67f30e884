"""An image with its labels and the predicted classes drawn over it, as a PNG file."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_nepa.config import IGNORED
from megatron_nepa.training.reporting.plot_style import save_figure

Pixels = npt.NDArray[np.uint8]
Classes = npt.NDArray[np.integer]

_OPACITY = 0.6
_PANEL_INCHES = 4.2
_LEGEND_COLUMNS = 5
_MOST_CLASSES = 20  # in the legend


def class_colours(num_classes: int) -> Pixels:
    """A colour for every class, the same in every picture, uint8 [K, 3].

    Neighbouring numbers lie a golden angle of hue apart, from a quiet blue on; three shades keep far ones apart.
    """
    shades = ((0.55, 0.75), (0.75, 0.95), (0.95, 0.6))  # saturation and value
    colours = [colorsys.hsv_to_rgb((0.58 + i * 0.61803398875) % 1, *shades[i % 3]) for i in range(num_classes)]
    return np.rint(np.array(colours) * 255).astype(np.uint8)


def write_overlay(path: Path, image: Pixels, labels: Classes, predictions: Classes, names: Sequence[str]) -> None:
    """Draw the image, its labels and the predictions side by side, with a legend of the classes in them.

    The file is replaced in one piece.

    Args:
        path: the PNG file to write.
        image: uint8 [H, W, 3].
        labels: [H, W], 255 where a pixel is ignored: it is drawn darkened, without colour.
        predictions: [H, W].
        names: the classes' names, [K].
    """
    height, width = labels.shape
    counts = np.bincount(labels[labels != IGNORED].ravel(), minlength=len(names))
    counts += np.bincount(predictions.ravel(), minlength=len(names))
    present = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    shown, colours = present[:_MOST_CLASSES], class_colours(len(names))

    panel_height = _PANEL_INCHES * min(max(height / width, 0.3), 2.0)
    legend_height = 0.15 + 0.22 * (-(-len(shown) // _LEGEND_COLUMNS))
    figure = Figure(figsize=(3 * _PANEL_INCHES, panel_height + legend_height + 0.4), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 3))
    for axes, title, pixels in zip(
        panels,
        ("image", "labels", "prediction"),
        (image, coloured(image, labels, colours), coloured(image, predictions, colours)),
        strict=True,
    ):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
        axes.set_axis_off()
    handles = [Patch(color=colours[i] / 255, label=names[i]) for i in shown]
    if len(present) > len(shown):
        handles.append(Patch(color="none", label=f"and {len(present) - len(shown)} more"))
    figure.legend(handles=handles, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=9)
    save_figure(figure, path)


def coloured(image: Pixels, classes: Classes, colours: Pixels) -> Pixels:
    """The grey image under its classes' colours.

    Args:
        image: uint8 [H, W, 3].
        classes: [H, W], 255 where a pixel is ignored.
        colours: of :func:`class_colours`.

    Returns:
        uint8 [H, W, 3].
    """
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    known = (classes != IGNORED)[..., None]
    over = colours[np.where(known[..., 0], classes, 0)]
    return np.where(known, (1 - _OPACITY) * grey + _OPACITY * over, 0.4 * grey).astype(np.uint8)
