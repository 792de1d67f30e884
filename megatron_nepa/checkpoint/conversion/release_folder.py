"""The authors' released models as folders: config.json and model.safetensors, or pytorch_model_ema.bin."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.checkpoint.conversion.release_config import model_from_release, model_to_release
from megatron_nepa.checkpoint.format.release_names import (
    add_missing_qk_norm,
    fold_layer_scale,
    from_release,
    require_releasable,
    to_release,
)
from megatron_nepa.checkpoint.format.safetensors_file import write_safetensors
from megatron_nepa.checkpoint.reading.tensor_files import MODEL_FILE, read_folder, unwrap
from megatron_nepa.checkpoint.reading.weights import Choice, Weights, trunk_layouts
from megatron_nepa.checkpoint.saving.checkpoints_folder import beside
from megatron_nepa.config import ConfigError, require

_CONFIG, _RAW, _EMA = "config.json", "model*.safetensors*", "pytorch_model_ema.bin"


def is_release(path: Path) -> bool:
    """Whether a folder looks like a released model."""
    return (path / _CONFIG).is_file() and (any(path.glob(_RAW)) or holds_average(path))


def holds_average(release: Path) -> bool:
    """Whether a released model's folder holds its average, which is read then unless the raw weights are chosen."""
    return (release / _EMA).is_file()


def read_release(folder: Path, choice: Choice | None = None, fold: bool = False) -> tuple[Weights, list[str]]:
    """The weights of a released model.

    Args:
        folder: with config.json and model.safetensors (raw) or pytorch_model_ema.bin (ema) or both.
        choice: which of the two; None takes the average where it is there.
        fold: multiply LayerScale into the layers before it.

    Returns:
        The weights, and what a user should know of the conversion.

    Raises:
        ConfigError: where a file is missing, needs pickle, or does not fit config.json.
    """
    require(is_release(folder), f"{folder} is no released model: it needs {_CONFIG}, and {MODEL_FILE} or {_EMA}.")
    try:
        values = json.loads((folder / _CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / _CONFIG} is no JSON: {error}.") from None
    try:
        config = model_from_release(values)
    except (TypeError, AttributeError) as error:  # a field of another type, or no object at all
        raise ConfigError(f"{folder / _CONFIG} describes no released model: {error}.") from None
    kind = choice or ("ema" if holds_average(folder) else "raw")
    state = unwrap(_read_average(folder / _EMA) if kind == "ema" else _read_raw(folder), folder)
    state, added = add_missing_qk_norm(state, config)
    notes = [f"QK-norm weights that are not in the file start as ones: {', '.join(added)}"] if added else []
    stored = from_release(state, config)
    tensors = {name: value.float() for name, value in stored.items()}
    misfits = [
        f"{name} is {tuple(tensors[name].shape)} in the file, {tuple(form.shape)} by {_CONFIG}"
        for name, form in trunk_layouts(config, masked=False).items()
        if tensors[name].shape != form.shape
    ]
    require(not misfits, f"{folder} contradicts itself: {'; '.join(misfits[:1])}.")
    if fold:
        tensors, config = fold_layer_scale(tensors, config)
        notes.append("LayerScale is folded: train with --model.layer_scale_init none")
    origin = f"{'average' if kind == 'ema' else 'raw weights'} of the release {folder}"
    return Weights(config, tensors, origin, dtypes={name: value.dtype for name, value in stored.items()}), notes


def write_release(
    weights: Weights,
    folder: Path,
    fold: bool = False,
    classes: Sequence[str] = (),
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Write a model as the authors' code reads it; the folder appears in one piece or not at all.

    Args:
        weights: the weights of a trunk or a classifier.
        folder: the folder to write; it must not exist.
        fold: multiply LayerScale into the layers before it.
        classes: names of a classifier's classes, by number.
        files: JSON files that are written besides, by name.

    Returns:
        What a user should know of the conversion.

    Raises:
        ConfigError: where ``folder`` exists, or the released format cannot hold the model.
    """
    require(not folder.exists(), f"{folder} exists: choose another name for the result.")
    left = weights.modules_of_the_objective()
    trunk = {name: value for name, value in weights.tensors.items() if name.partition(".")[0] not in left}
    notes = [f"left out, of the objective {weights.objective}: {module}.* ({left[module]} tensors)" for module in left]
    weights = replace(weights, tensors=trunk)
    require_releasable(weights.tensors)
    tensors, model = fold_layer_scale(weights.tensors, weights.model) if fold else (weights.tensors, weights.model)
    num_labels = tensors["classifier.bias"].shape[0] if "classifier.bias" in tensors else None
    config = model_to_release(model, num_labels, pooled="fc_norm.weight" in tensors, classes=classes)
    state = to_release(tensors, model)
    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, values in {_CONFIG: config, **(files or {})}.items():
        (partial / file).write_text(json.dumps(values, indent=2) + "\n")
    # the parts of a fused tensor share its memory, which safetensors refuses
    write_safetensors(
        {name: value.float().clone() for name, value in state.items()}, partial / "model.safetensors", {"format": "pt"}
    )
    partial.rename(folder)
    dropped = sorted(tensors.keys() - from_release(state, model).keys())
    return notes + ([f"left out, since the release has no such tensor: {', '.join(dropped)}"] if dropped else [])


def _read_raw(folder: Path) -> dict[str, Tensor]:
    require(any(folder.glob(_RAW)), f"{folder} holds no {MODEL_FILE}: ask for the average ({_EMA}).")
    return read_folder(folder)


def _read_average(path: Path) -> dict[str, Tensor]:
    require(path.is_file(), f"{path} does not exist: ask for the raw weights.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{path} is refused: it holds more than tensors, which only pickle could load and pickle runs code "
            f"({reason}); ask its author for safetensors."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} is no state dict: a name to a tensor is expected.")
    return state
