"""From images and checkpoints to files: PNG figures, and the numbers in them as npz."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_nepa.analysis.figures import draw_evolution, draw_predictions, draw_triplets
from megatron_nepa.analysis.images import Pixels, load_image
from megatron_nepa.analysis.maps import Heads, Maps, compute_maps
from megatron_nepa.analysis.queries import Patch, choose_queries
from megatron_nepa.analysis.reconstruction import describe_task, draw_reconstruction, pixel_model
from megatron_nepa.checkpoint.conversion.compare import read_any
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.weights import Choice
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, step_of
from megatron_nepa.config import ConfigError, ModelConfig, require
from megatron_nepa.files import whole_or_absent

_MOST_ROWS = 8  # of an evolution, where the steps are not chosen


@dataclass(frozen=True)
class View:
    """What is shown of an image.

    Attributes:
        queries: as in :func:`~megatron_nepa.analysis.queries.choose_queries`.
        layers: "all", or blocks and ranges of them such as "0,3,8-11": their attention's mean is drawn.
        heads: their mean, the maximum of each patch, or each for itself.
        size: shorter side of the image, pixels; None takes the model's.
        square: keep the image's middle square only.
        bidirectional: let every patch see the whole image, whatever the checkpoint's config says.
        weights: average (ema) or raw; None takes the average where there is one.
    """

    queries: tuple[str, ...] = ("auto",)
    layers: str = "all"
    heads: Heads = "mean"
    size: int | None = None
    square: bool = False
    bidirectional: bool = False
    weights: Choice | None = None


@dataclass(frozen=True)
class _Scene:
    """An image as the model sees it, its queries, and the name that its files get."""

    path: Path
    pixels: Pixels
    queries: list[Patch]


def visualize(images: Sequence[Path], checkpoint: Path, out: Path, view: View) -> list[Path]:
    """Draw OUT/NAME.png (triplets) and OUT/NAME_prediction.png of every image, with OUT/NAME.npz.

    Of a run that predicts pixels (MAE, AIM) OUT/NAME_reconstruction.png takes the second one's place.

    The npz holds the fields of :class:`~megatron_nepa.analysis.maps.Maps` (attention of all layers and heads), the
    image uint8 [H, W, 3] and its patch size.

    Args:
        images: files.
        checkpoint: of this project or the release, an OUTPUT_DIR for its newest, or a consolidated file.
        out: folder, made where it is missing.
        view: what is shown.

    Returns:
        The files that were written.

    Raises:
        ConfigError: before anything is written, where an image, the checkpoint or the view cannot serve, or a file
            exists.
    """
    weights = read_any(checkpoint, view.weights)
    model = weights.model
    layers = choose_layers(view.layers, model.num_layers)
    scenes = [_scene(path, model, view) for path in images]
    of_pixels = pixel_model(checkpoint, weights)
    last = "_prediction.png" if of_pixels is None else "_reconstruction.png"
    written = _claim(out, scenes, (".npz", ".png", last))
    for scene, (npz, triplets, predictions) in zip(scenes, written, strict=True):
        maps = compute_maps(weights, scene.pixels, scene.queries, view.bidirectional)
        _save_arrays(npz, {**maps.arrays(), "image": scene.pixels, "patch_size": np.array(model.patch_size)})
        title = _describe(scene, maps, view)
        draw_triplets(triplets, maps, scene.pixels, model.patch_size, layers, view.heads, f"{title}\n{weights.origin}")
        if of_pixels is not None:
            title = f"{scene.path.name}: {describe_task(of_pixels)}"
            draw_reconstruction(predictions, of_pixels, scene.pixels, f"{title}\n{weights.origin}")
            continue
        source = "those before it" if maps.causal else "the whole image, itself included"
        title = f"{scene.path.name}: how well each patch is predicted from {source}"
        draw_predictions(predictions, maps, scene.pixels, model.patch_size, f"{title}\n{weights.origin}")
    return [path for paths in written for path in paths]


def visualize_evolution(
    images: Sequence[Path], run: Path, out: Path, view: View, steps: Sequence[int] = ()
) -> list[Path]:
    """Draw OUT/NAME_evolution.png of every image: one row a checkpoint of a run, with the numbers as npz.

    The npz holds ``step`` [S] and the fields of :class:`~megatron_nepa.analysis.maps.Maps`, those that change with the
    checkpoint with a leading axis S.

    Args:
        images, out, view: as in :func:`visualize`.
        run: an OUTPUT_DIR, or its folder of checkpoints.
        steps: of the checkpoints to show; none takes all, or eight of them evenly spread.

    Returns:
        The files that were written.

    Raises:
        ConfigError: as :func:`visualize`, and where the run has no such checkpoint.
    """
    checkpoints = choose_checkpoints(run, steps)
    model = ModelConfig(**read_manifest(next(iter(checkpoints.values())))["run"]["model"])
    layers = choose_layers(view.layers, model.num_layers)
    scenes = [_scene(path, model, view) for path in images]
    written = _claim(out, scenes, ("_evolution.npz", "_evolution.png"))
    maps: list[dict[int, Maps]] = [{} for _ in scenes]
    for step, checkpoint in checkpoints.items():
        weights = read_any(checkpoint, view.weights)
        for scene, of_image in zip(scenes, maps, strict=True):
            of_image[step] = compute_maps(weights, scene.pixels, scene.queries, view.bidirectional)
    for scene, of_image, (npz, figure) in zip(scenes, maps, written, strict=True):
        _save_arrays(npz, {**_stack(of_image), "image": scene.pixels, "patch_size": np.array(model.patch_size)})
        title = _describe(scene, next(iter(of_image.values())), view)
        note = f"{run}; mean cosine: of every patch's embedding and its prediction"
        draw_evolution(figure, of_image, scene.pixels, model.patch_size, layers, view.heads, f"{title}\n{note}")
    return [path for paths in written for path in paths]


def choose_layers(wish: str, num_layers: int) -> list[int]:
    """The blocks that a wish such as "all" or "0,3,8-11" names, counted from 0.

    Raises:
        ConfigError: where it names none, or one that the model does not have.
    """
    if wish == "all":
        return list(range(num_layers))
    layers: set[int] = set()
    for part in wish.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"layers {wish!r} is neither all nor a list such as 0,3,8-11.")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    require(
        max(layers) < num_layers,
        f"layers {wish} asks for layer {max(layers)}, but this model has 0 to {num_layers - 1}.",
    )
    return sorted(layers)


def choose_checkpoints(run: Path, steps: Sequence[int] = ()) -> dict[int, Path]:
    """The checkpoints of a run by step, oldest first: those of ``steps``, or at most eight evenly spread ones.

    Raises:
        ConfigError: where the run has none, or not those.
    """
    store = CheckpointStore.of(run)
    if not store.folder.is_dir():
        store = CheckpointStore(run)
    found = {step_of(path): path for path in store.newest_first()}
    there = sorted(step for step, path in found.items() if path.is_dir())
    require(bool(there), f"{run} holds no checkpoints: give the OUTPUT_DIR of a run.")
    for step in steps:
        require(step in there, f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, there))}.")
    if not steps:
        places = np.linspace(0, len(there) - 1, min(len(there), _MOST_ROWS)).round().astype(int)
        steps = [there[place] for place in places]
    return {step: found[step] for step in sorted(set(steps))}


def _scene(path: Path, model: ModelConfig, view: View) -> _Scene:
    pixels = load_image(path, model, view.size, view.square)
    return _Scene(path, pixels, choose_queries(view.queries, pixels, model.patch_size, str(path)))


def _claim(out: Path, scenes: Sequence[_Scene], endings: Sequence[str]) -> list[list[Path]]:
    """Each image's files, none of which is there yet, in a folder that is."""
    written = [[out / f"{scene.path.stem}{ending}" for ending in endings] for scene in scenes]
    names = [scene.path.stem for scene in scenes]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"several images are called {', '.join(twice)}: their files would overwrite each other.")
    existing = [path for paths in written for path in paths if path.exists()]
    require(not existing, f"{', '.join(map(str, existing[:1]))} exists: choose another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {out} cannot be made: {error.strerror}.") from None
    return written


def _describe(scene: _Scene, maps: Maps, view: View) -> str:
    num_layers, num_heads = maps.attention.shape[:2]
    layers = f"all {num_layers} layers" if view.layers == "all" else f"layers {view.layers}"
    heads = {"mean": f" and {num_heads} heads", "max": f", maximum of {num_heads} heads", "each": ", each head"}
    direction = "causal" if maps.causal else "bidirectional"
    return f"{scene.path.name}: {direction} attention, mean of {layers}{heads[view.heads]}"


def _stack(maps: dict[int, Maps]) -> dict[str, NDArray[Any]]:
    arrays = [found.arrays() for found in maps.values()]
    constant = ("queries", "causal", "bos_token")
    stacked = {
        name: arrays[0][name] if name in constant else np.stack([part[name] for part in arrays]) for name in arrays[0]
    }
    return {"step": np.array(list(maps)), **stacked}


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    with whole_or_absent(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
