"""Which patches ask."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nepa.analysis.queries import auto_queries, choose_queries, grid_queries
from megatron_nepa.config import ConfigError


def noise_at(rows: int, columns: int, *patches: tuple[int, int]) -> np.ndarray:
    """A grey image of 4-pixel patches with contrast in the given ones."""
    pixels = np.full((4 * rows, 4 * columns, 3), 128, np.uint8)
    for y, x in patches:
        pixels[4 * y : 4 * y + 2, 4 * x : 4 * x + 4] = 255
    return pixels


def test_auto_takes_the_contrast_of_each_band() -> None:
    # rows 0 and 1 are passed over, and so is the last column
    pixels = noise_at(8, 6, (0, 0), (2, 3), (3, 5), (5, 1), (7, 4))
    assert auto_queries(pixels, 4) == [(2, 3), (5, 1), (7, 4)]
    assert choose_queries(["auto"], pixels, 4, "it") == auto_queries(pixels, 4)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 9), (9, 1), (2, 2), (3, 3)])
def test_auto_never_takes_the_last_patch(shape: tuple[int, int]) -> None:
    rows, columns = shape
    queries = auto_queries(noise_at(rows, columns, (rows - 1, columns - 1)), 4)
    assert queries
    assert len(set(queries)) == len(queries)
    assert all(0 <= y < rows and 0 <= x < columns and (y, x) != (rows - 1, columns - 1) for y, x in queries)


def test_a_grid_is_spread_evenly() -> None:
    assert grid_queries(2, 8, 12, "it") == [(2, 3), (2, 9), (6, 3), (6, 9)]
    assert grid_queries(1, 3, 3, "it") == [(1, 1)]
    assert len(grid_queries(3, 3, 3, "it")) == 8  # the last patch predicts nothing
    assert choose_queries(["grid"], noise_at(9, 9), 4, "it") == grid_queries(3, 9, 9, "it")


def test_chosen_queries() -> None:
    assert choose_queries(["0,0", "2,5"], noise_at(3, 7), 4, "it") == [(0, 0), (2, 5)]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["3,0"], r"query 3,0 lies outside cat.jpg, whose patches are 0,0 to 2,6 \(y,x\)"),
        (["0,7"], "query 0,7 lies outside"),
        (["0,0", "2,6"], "query 2,6 is the last patch of cat.jpg: there is no next"),
        (["-1,0"], "query is '-1,0'; give"),
        ([""], "query is ''; give auto, grid or grid:N alone, or patches as y,x"),
        (["auto", "1,1"], "query is 'auto 1,1'; give auto, grid or grid:N alone"),
        (["grid:4"], "grid:4 does not fit cat.jpg, which has 3 x 7 patches: choose 1 to 3"),
        (["grid:0"], "grid:0 does not fit"),
    ],
)
def test_a_query_that_cannot_be(wishes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_queries(wishes, noise_at(3, 7), 4, "cat.jpg")
