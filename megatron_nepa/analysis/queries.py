"""Which patches ask: chosen, evenly spread, or picked by contrast. A patch is (y, x), from 0,0 at the top left."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatron_nepa.analysis.images import Pixels
from megatron_nepa.config import ConfigError, require

Patch = tuple[int, int]
DEFAULT_GRID = 3
_NUM_AUTO = 3


def choose_queries(wishes: Sequence[str], pixels: Pixels, patch_size: int, name: str) -> list[Patch]:
    """The query patches of an image.

    Args:
        wishes: ``["auto"]``, ``["grid"]`` or ``["grid:N"]`` for N x N evenly spread ones, or one "y,x" a query.
        pixels: the image, [H, W, 3].
        patch_size: side of a patch, pixels.
        name: the image's name, for messages.

    Raises:
        ConfigError: for a wish that is none of these, or a patch that is not in the image or has no next one.
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    if list(wishes) == ["auto"]:
        return auto_queries(pixels, patch_size)
    if len(wishes) == 1 and (match := re.fullmatch(r"grid(?::(\d+))?", wishes[0])):
        return grid_queries(int(match[1] or DEFAULT_GRID), rows, columns, name)
    queries = []
    for wish in wishes:
        match = re.fullmatch(r"(\d+),(\d+)", wish)
        if match is None:
            raise ConfigError(
                f"the query is {' '.join(wishes)!r}; give auto, grid or grid:N alone, or patches as y,x (from 0)."
            )
        y, x = int(match[1]), int(match[2])
        require(
            y < rows and x < columns,
            f"query {wish} lies outside {name}, whose patches are 0,0 to {rows - 1},{columns - 1} (y,x).",
        )
        require(
            (y, x) != (rows - 1, columns - 1), f"query {wish} is the last patch of {name}: there is no next to predict."
        )
        queries.append((y, x))
    return queries


def grid_queries(count: int, rows: int, columns: int, name: str) -> list[Patch]:
    """``count`` x ``count`` patches in the middles of equal parts of the image, without the very last patch.

    Raises:
        ConfigError: where the image has fewer patches on a side than that.
    """
    require(
        1 <= count <= min(rows, columns),
        f"grid:{count} does not fit {name}, which has {rows} x {columns} patches: choose 1 to {min(rows, columns)}.",
    )
    ys, xs = ([(2 * i + 1) * length // (2 * count) for i in range(count)] for length in (rows, columns))
    return [(y, x) for y in ys for x in xs if (y, x) != (rows - 1, columns - 1)]


def auto_queries(pixels: Pixels, patch_size: int) -> list[Patch]:
    """The patches of most contrast, one in each of three bands of equal height: the same for every checkpoint.

    The first rows are passed over, since a causal query there sees little, and so is the last column, whose next patch
    lies at the other side of the image; where that leaves nothing, the whole image but its last patch is taken.
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    grey = pixels[: rows * patch_size, : columns * patch_size].mean(axis=2)
    contrast = grey.reshape(rows, patch_size, columns, patch_size).std(axis=(1, 3))  # [rows, columns]
    contrast[-1, -1] = -1.0
    if columns > 1:
        contrast[:, -1] = -1.0
    bands = [band for band in np.array_split(np.arange(rows // 4, rows), _NUM_AUTO) if len(band)]
    best = [np.unravel_index(contrast[band].argmax(), (len(band), columns)) for band in bands]
    found = [(int(band[y]), int(x)) for band, (y, x) in zip(bands, best, strict=True)]
    return [query for query in found if contrast[query] >= 0] or [(0, 0)]
