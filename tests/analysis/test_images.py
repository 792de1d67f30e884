"""Images of any size fit the patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nepa.analysis.images import load_image, to_tensor
from megatron_nepa.config import ConfigError
from tests.analysis.models import MODEL, PHOTOGRAPH

LEARNED = replace(MODEL, position_embedding="learned")


def save(folder: Path, width: int, height: int, mode: str = "RGB") -> Path:
    path = folder / f"{width}x{height}.png"
    Image.fromarray(PHOTOGRAPH).resize((width, height)).convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (100, 100, None, (56, 56)),
        (300, 200, None, (56, 84)),  # height, width
        (200, 300, 112, (168, 112)),
        (133, 100, 28, (28, 42)),  # 37.2 rounds to 3 patches
        (5, 3, None, (56, 98)),
        (100, 100, 30, (28, 28)),
        (90, 45, 14, (14, 28)),
    ],
)
def test_sides_are_whole_patches(
    width: int, height: int, size: int | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    assert load_image(save(tmp_path, width, height), MODEL, size).shape == (*expected, 3)


def test_the_middle_square_and_other_modes(tmp_path: Path) -> None:
    square = load_image(save(tmp_path, 200, 100, "L"), MODEL, square=True)
    assert square.shape == (56, 56, 3)
    middle = Image.open(tmp_path / "200x100.png").convert("RGB").crop((50, 0, 150, 100)).resize((56, 56))
    assert np.abs(square.astype(int) - np.asarray(middle)).max() <= 1
    assert load_image(save(tmp_path, 60, 60, "P"), MODEL).shape == (56, 56, 3)


def test_pixels_become_the_models_input() -> None:
    pixels = np.array([[[0, 51, 255]]], np.uint8)
    tensor = to_tensor(pixels)
    assert tensor.shape == (1, 3, 1, 1)
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_learned_positions_fit_one_size(tmp_path: Path) -> None:
    path = save(tmp_path, 300, 200)
    with pytest.raises(ConfigError, match=r"fit 56 x 56 pixels only, but .*300x200.png becomes 56 x 84: give --square"):
        load_image(path, LEARNED)
    with pytest.raises(ConfigError, match="becomes 112 x 112: give --square and no --size"):
        load_image(path, LEARNED, 112, square=True)
    assert load_image(path, LEARNED, square=True).shape == (56, 56, 3)


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no image .*none.png"):
        load_image(tmp_path / "none.png", MODEL)
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        load_image(tmp_path, MODEL)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ConfigError, match=r"text.png cannot be read as an image"):
        load_image(tmp_path / "text.png", MODEL)
    whole = save(tmp_path, 100, 100).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cut.png cannot be read as an image"):
        load_image(tmp_path / "cut.png", MODEL)
    with pytest.raises(ConfigError, match="size 13 is less than one patch of 14 pixels"):
        load_image(save(tmp_path, 100, 100), MODEL, 13)
    with pytest.raises(ConfigError, match=r"becomes 7143 x 7143 patches at size 100000, .* at most 10,000"):
        load_image(save(tmp_path, 100, 100), MODEL, 100_000)
    with pytest.raises(ConfigError, match="is a single patch at size 14"):
        load_image(save(tmp_path, 100, 100), MODEL, 14)
