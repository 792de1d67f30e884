"""A small folder of real photographs in many sizes, shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megatron_nepa.data.index.builtin import builtin_folder

SIZES = [(256, 192), (90, 200), (333, 111), (120, 120), (64, 300), (401, 77), (223, 225), (30, 31)]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in set, made once in a folder of this test run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_NEPA_CACHE", str(folder))
        return builtin_folder(verbose=False)


@pytest.fixture(scope="session")
def photographs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree: 3 classes, 37 JPEGs of 8 sizes, chroma subsampled or not."""
    root = tmp_path_factory.mktemp("photographs")
    sources = sorted(cache.glob("*/0000.jpg")) + sorted(cache.glob("*/0030.jpg")) + sorted(cache.glob("*/0060.jpg"))
    for number, source in enumerate(sources[:37]):
        folder = root / ("ant", "bee", "cow")[number % 3]
        folder.mkdir(exist_ok=True)
        image = Image.open(source).resize(SIZES[number % len(SIZES)])
        image.save(folder / f"{number:02d}.jpg", quality=85 + number % 10, subsampling=number % 3)
    return root
