"""What a checkpoint says of its model and of the run that trained it; no tensor is read and no code is run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_nepa.checkpoint.conversion.huggingface_config import model_from_huggingface
from megatron_nepa.checkpoint.conversion.huggingface_folder import is_huggingface, read_config
from megatron_nepa.checkpoint.conversion.release_config import model_from_release, names_of_labels
from megatron_nepa.checkpoint.conversion.release_folder import is_release
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import names_of, stored_tensors
from megatron_nepa.config import ConfigError, ModelConfig, require

_PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Described:
    """A model as its checkpoint describes it.

    Attributes:
        model: its shape.
        settings: of the run that trained it, as "section.field" to value; of weights that are stored alone the few
            that their files tell.
        classes: names of what its head tells apart, by number; empty where they are not known.
    """

    model: ModelConfig
    settings: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def describe_checkpoint(path: str) -> Described:
    """The description of a checkpoint, an OUTPUT_DIR, a released or exported model's folder, or a file of weights.

    Raises:
        ConfigError: where ``path`` is none of them, or does not say what model it holds.
    """
    source = Path(path)
    if source.is_file():
        return _of_file(source)
    if is_huggingface(source):
        values = read_config(source)
        pooling = {"head.pooling": values.get("pooling", "last")}
        return Described(model_from_huggingface(values), {**pooling, **_shown(source)}, names_of_labels(values))
    if is_release(source):
        values = read_config(source)
        try:
            model = model_from_release(values)
        except (TypeError, AttributeError) as error:  # a field of another type
            raise ConfigError(f"{source / 'config.json'} describes no released model: {error}.") from None
        pooling = {"head.pooling": "mean" if values.get("add_pooling_layer") else "last"}
        return Described(model, pooling, names_of_labels(values))
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    settings = _flat(manifest["run"])
    if not manifest["has_optimizer"]:
        settings |= _pooling(names_of("master", stored_tensors(checkpoint)))
    return Described(_model(manifest["run"]["model"]), settings, tuple(manifest["run"].get("classes") or ()))


def holds_weights_alone(path: str) -> bool:
    """Whether a path is a file of weights, or the folder of a released or exported model, rather than a run's."""
    return Path(path).is_file() or is_release(Path(path))


def _of_file(path: Path) -> Described:
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors ({error}): it is cut short, or a file of another kind, such as a "
            "pickle."
        ) from None
    require("model" in metadata, f"{path} does not say what model it holds: it was not written by consolidate.")
    return Described(_model(json.loads(metadata["model"])), _pooling(names))


def _pooling(names: Iterable[str]) -> dict[str, Any]:
    """What a classifier of these tensors pools; nothing for another model."""
    found = set(names)
    return {"head.pooling": "mean" if "fc_norm.weight" in found else "last"} if "classifier.weight" in found else {}


def _shown(folder: Path) -> dict[str, Any]:
    """How an exported folder's evaluation resizes images, as far as it says it as its export writes it."""
    try:
        size = json.loads((folder / _PREPROCESSOR).read_text())["size"]
        if "shortest_edge" in size:
            return {"evaluation.resize_size": int(size["shortest_edge"]), "evaluation.squash": False}
        return {"evaluation.resize_size": int(size["height"]), "evaluation.squash": True}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _model(values: Mapping[str, Any]) -> ModelConfig:
    known = {entry.name for entry in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in values.items() if name in known})


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in run.items():
        nested = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        found |= nested
    return found


def values_of(model: ModelConfig) -> dict[str, Any]:
    """A model's fields as "model.field" to value."""
    return {f"model.{name}": value for name, value in asdict(model).items()}
