"""The features of many images in one file, written in parts that any number of ranks makes and a later start continues.

A rank makes every world-size-th part of 1,024 images (fewer where patches make them large), written beside its place
and renamed, so that a part is complete or absent. Whoever finds all of them done joins them, part by part: memory does
not grow with the number of images.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import PackedNames
from megatron_nepa.files import AlreadyHeldError, Hold, replace_text, whole_or_absent
from megatron_nepa.library.feature_files import WRITERS
from megatron_nepa.library.model import NepaModel
from megatron_nepa.library.outputs import require_writable
from megatron_nepa.library.pictures import Pictures
from megatron_nepa.parallel.launcher import Place

Kind = Literal["last", "mean", "patches"]
_PART_IMAGES, _PART_BYTES = 1024, 64 << 20


@dataclass(frozen=True)
class FeatureChoice:
    """Which numbers are kept of an image.

    Attributes:
        kind: the last patch's token [D], the mean of the patches [D], or all patches [P, D].
        block: counted from 0, whose residual stream is taken, without a norm; None takes the final norm's output.
        dtype: of the file.
        batch_size: images computed at once; a rounding error may depend on it.
    """

    kind: Kind = "last"
    block: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be at least 1.")

    @torch.no_grad()
    def of(self, model: NepaModel, images: Tensor) -> npt.NDArray[np.floating[Any]]:
        """The features of images [B, 3, H, W]: [B, D] or [B, P, D]."""
        if self.block is None:
            found = model.forward_features(images)
            chosen = {"last": found.last, "mean": found.mean, "patches": found.patches}[self.kind]
        else:
            (patches,) = model.forward_intermediates(images, [self.block], output_fmt="NLC", intermediates_only=True)
            chosen = {"last": patches[:, -1], "mean": patches.float().mean(1), "patches": patches}[self.kind]
        array: npt.NDArray[np.floating[Any]] = chosen.float().cpu().numpy().astype(self.dtype)
        require(bool(np.isfinite(array).all()), f"features are not finite in {self.dtype}: take --dtype float32.")
        return array


def embed(
    model: NepaModel,
    pictures: Pictures,
    out: Path,
    choice: FeatureChoice,
    place: Place,
    threads: int,
    advance: Callable[[int], None],
) -> Path | None:
    """Write the features of all pictures, in their order; every rank calls it, and none waits for another.

    Args:
        model: in evaluation mode.
        pictures: to look at.
        out: ``.npy`` or ``.safetensors``, with the names beside it as ``OUT.names.txt``, or ``.parquet``.
        choice: of the features.
        place: this rank's.
        threads: that decode.
        advance: told of images that are done, for a progress bar.

    Returns:
        ``out`` on the rank that joined the parts; None on the others, whose share is done.

    Raises:
        ConfigError: ``out`` exists, has another ending or cannot be written, its begun parts are of other settings, or
            an image cannot be read, by name.
    """
    require(out.suffix in WRITERS, f"{out} must end in {', '.join(WRITERS)}, which say the format.")
    require(not out.exists(), f"{out} exists: choose another name for the result.")
    require(len(pictures.names) > 0, "there are no images to embed.")
    require_writable(out.parent)
    folder = out.with_name(f".{out.name}.parts")
    shape = choice.of(model, model.preprocess(pictures.read(0))[None].to(_device(model))).shape[1:]
    length = max(1, min(_PART_IMAGES, _PART_BYTES // (4 * int(np.prod(shape)))))
    length = max(1, length // choice.batch_size) * choice.batch_size
    _agree(folder, {"images": _digest(pictures.names), "model": _checksum(model), "part": length, **asdict(choice)})
    count = len(pictures.names)
    parts = [range(first, min(first + length, count)) for first in range(0, count, length)]
    for number in range(place.rank, len(parts), place.world_size):
        path = folder / f"{number:06d}.npy"
        if not path.exists():
            _write_part(path, model, pictures, parts[number], choice, threads, advance)
        else:
            advance(len(parts[number]))
    files = [folder / f"{number:06d}.npy" for number in range(len(parts))]
    if not all(file.exists() for file in files):
        return None
    try:
        hold = Hold(folder / "joining")
    except AlreadyHeldError:  # another rank came to the end in the same moment
        return None
    try:
        if out.exists():
            return None
        WRITERS[out.suffix](out, files, (count, *shape), choice.dtype, pictures.names)
    finally:
        hold.release()
    shutil.rmtree(folder)
    return out


def _write_part(
    path: Path,
    model: NepaModel,
    pictures: Pictures,
    numbers: range,
    choice: FeatureChoice,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    found = []
    for batch in pictures.batches(numbers, choice.batch_size, model.preprocess, threads):
        found.append(choice.of(model, torch.stack(batch).to(_device(model))))
        advance(len(batch))
    with whole_or_absent(path) as partial, partial.open("wb") as file:
        np.save(file, np.concatenate(found))


def _device(model: NepaModel) -> torch.device:
    return model.trunk.norm.weight.device


def _agree(folder: Path, settings: dict[str, Any]) -> None:
    """Begin the parts, or see that those that were begun are of the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():
        replace_text(path, json.dumps(settings, indent=1))
    try:
        begun = json.loads(path.read_text())
    except ValueError:
        raise ConfigError(f"{path} is damaged: remove {folder} to begin anew.") from None
    differing = [name for name in settings if begun.get(name) != settings[name]]
    require(
        not differing,
        f"{folder} holds features that were begun with other {', '.join(differing)}: give the same settings to "
        "continue, or remove it to begin anew.",
    )


def _digest(names: PackedNames) -> str:
    return sha256(names.text.tobytes() + names.ends.tobytes()).hexdigest()


def _checksum(model: NepaModel) -> str:
    """Of the weights and what the model does with them."""
    checksum = zlib.crc32(repr((model.config, model.preprocess)).encode())
    for param in model.parameters():
        checksum = zlib.crc32(param.detach().float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"
