"""The built-in set: photographs that ship inside scikit-image and scikit-learn, cut into JPEG crops.

It lets the main job run on real photographs with no download. The crops overlap and come from few photographs, so it
serves to see a run work, not to learn features worth keeping. The photograph's name is the class label.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.index_file import load_index, save_index

# part of the folder's name: raise it whenever a crop changes, so that an old cache is never mistaken for the new set
VERSION = 1

# every photograph found in the wheels themselves (drawings, charts and test patterns are left out)
PHOTOGRAPHS = {
    "skimage": (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
        *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
        *("motorcycle_right.png", "retina.jpg", "rocket.jpg"),
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

_SCALES = (1.0, 0.75, 0.55)
_WINDOWS = ((256, 192), (192, 256), (208, 208), (160, 160))  # width, height
_CROPS_PER_WINDOW = 10
_JPEG_QUALITY = 90


def cache_folder() -> Path:
    """Folder of generated files: $MEGATRON_NEPA_CACHE, else megatron_nepa in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MEGATRON_NEPA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_nepa"


def builtin_index(verbose: bool = True) -> DatasetIndex:
    """The built-in set. Its index is kept beside it, so that a start opens no image.

    Args:
        verbose: say in one line that the set is being made.

    Raises:
        ConfigError: as :func:`builtin_folder`.
    """
    folder = builtin_folder(verbose)
    path = folder.with_name(f"{folder.name}.index")
    with contextlib.suppress(ConfigError):  # there is none yet, or it is damaged
        return load_index(path)
    index = scan_folder(folder)
    with contextlib.suppress(ConfigError, OSError):  # another process was first, or the cache cannot be written
        save_index(index, path)
    return index


def builtin_folder(verbose: bool = True) -> Path:
    """The built-in set as an ImageFolder tree (class folder / crop), made on first use.

    The set is written beside its place and renamed, so a folder of this name is always complete: of several processes
    that start together each may write, one rename wins and the others take the winner's.

    Args:
        verbose: say in one line that the set is being made.

    Raises:
        ConfigError: the packages that hold the photographs are not installed, or the cache cannot be written.
    """
    target = cache_folder() / f"builtin-v{VERSION}"
    if target.is_dir():
        return target
    photographs = list(photograph_files())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}-{secrets.token_hex(4)}")  # mkdtemp would lock out others
        beside.mkdir()
    except OSError as error:
        raise ConfigError(
            f"the built-in photographs cannot be written to {target.parent} ({error.strerror}): "
            "set MEGATRON_NEPA_CACHE to a folder that can be written, or give --data."
        ) from error
    try:
        count = sum(_write_crops(photograph, beside) for photograph in photographs)
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():  # not lost to another process: a real failure
                raise
        else:
            if verbose:
                print(f"made the built-in set: {count} crops of {len(photographs)} photographs in {target}", flush=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def photograph_files() -> Iterator[Path]:
    """The photographs inside the installed packages.

    Raises:
        ConfigError: a package, or a photograph in it, is missing.
    """
    for module, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"the built-in photographs need {_PACKAGES[module]}: install it (pip install {_PACKAGES[module]}), "
                "or give a folder of images with --data."
            )
        folder = Path(spec.origin).parent / _FOLDERS[module]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"this {_PACKAGES[module]} holds no {', '.join(missing)} in {folder}: install another version, "
                "or give a folder of images with --data."
            )
        yield from (folder / name for name in names)


def _write_crops(photograph: Path, folder: Path) -> int:
    """Write the crops of one photograph into ``folder``/<its name>; returns how many."""
    (folder / photograph.stem).mkdir()
    original = Image.open(photograph).convert("RGB")
    count = 0
    for scale in _SCALES:
        size = (round(original.width * scale), round(original.height * scale))
        image = original.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        for width, height in _WINDOWS:
            if width > image.width or height > image.height:
                continue
            for x, y in _grid(image.width - width, image.height - height):
                crop = image.crop((x, y, x + width, y + height))
                crop.save(folder / photograph.stem / f"{count:04d}.jpg", quality=_JPEG_QUALITY)
                count += 1
    return count


def _grid(spare_width: int, spare_height: int) -> list[tuple[int, int]]:
    """About ``_CROPS_PER_WINDOW`` corners spread evenly over the room that a window has, without repeats."""
    columns = max(1, round((_CROPS_PER_WINDOW * (spare_width + 1) / (spare_height + 1)) ** 0.5))
    columns = min(columns, _CROPS_PER_WINDOW, spare_width + 1)
    rows = min(max(1, round(_CROPS_PER_WINDOW / columns)), spare_height + 1)
    xs = np.linspace(0, spare_width, columns).round().astype(int)
    ys = np.linspace(0, spare_height, rows).round().astype(int)
    return [(int(x), int(y)) for y in ys for x in xs]
