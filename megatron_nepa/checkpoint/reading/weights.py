"""A model's weights outside a run: read whole from a checkpoint of any grid, written as one that a run starts from."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_nepa.checkpoint.format.manifest import file_facts, verify_files, write_manifest
from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN
from megatron_nepa.checkpoint.format.safetensors_file import write_safetensors
from megatron_nepa.checkpoint.format.state import stored_dtype
from megatron_nepa.checkpoint.format.torch_checkpoint import load_shares, read_entries, save_shares
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.tensor_files import read_safetensors, unwrap
from megatron_nepa.checkpoint.saving.checkpoints_folder import (
    Progress,
    beside,
    sync_folder,
)
from megatron_nepa.config import ModelConfig, NepaObjective, OptimizerConfig, read_objective, require
from megatron_nepa.models.build import Build
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.parallel.parameters import ParameterLayout, layout_of

Choice = Literal["ema", "raw"]


@dataclass(frozen=True)
class Weights:
    """A model's weights, whole.

    Attributes:
        model: the model that they belong to.
        tensors: fp32, under the names of the model's parameters.
        origin: what they are, in words.
        buffers: the module's persistent ones, under their names.
        dtypes: in which tensors were stored, where that may not be as they are here.
        objective: name of the objective of pre-training whose tensors lie beside the trunk's; None where there is none.
    """

    model: ModelConfig
    tensors: dict[str, Tensor]
    origin: str
    buffers: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    objective: str | None = None

    def modules_of_the_objective(self) -> dict[str, int]:
        """What the objective added to the trunk, by module, and the number of its tensors."""
        if self.objective in (None, "nepa"):  # which adds none
            return {}
        modules = Counter(name.partition(".")[0] for name in sorted(self.tensors))
        return {module: count for module, count in modules.items() if module != "trunk"}


def read_weights(path: str | Path, choice: Choice | None = None) -> Weights:
    """The weights of a checkpoint, from whatever grid wrote it; its files are verified.

    Args:
        path: a checkpoint, or an OUTPUT_DIR for its newest one.
        choice: the average (ema) or the raw weights; None takes the average where there is one.

    Raises:
        ConfigError: where there is no checkpoint, it is damaged, or holds no average.
    """
    checkpoint = find_checkpoint(str(path))
    manifest = verify_files(checkpoint)
    kind = choose_kind(checkpoint, manifest, choice)
    stored = stored_tensors(checkpoint)
    names = names_of("master", stored)
    # a frozen parameter has no average: it is its own
    keys = {name: f"{kind}.{name}" if f"{kind}.{name}" in stored else f"master.{name}" for name in names}
    buffer_keys = {name: f"buffer.{name}" for name in names_of("buffer", stored)}
    state = load_whole(checkpoint, [*keys.values(), *buffer_keys.values()], stored)
    model = ModelConfig(**manifest["run"]["model"])
    forms = parameter_forms(manifest["run"], names)
    tensors = {
        name: state[key].reshape(forms[name].shape) if name in forms else state[key] for name, key in keys.items()
    }
    origin = describe_origin(checkpoint, manifest, kind)
    objective = read_objective(manifest["run"])
    return Weights(
        model,
        tensors,
        origin,
        {name: state[key] for name, key in buffer_keys.items()},
        objective=None if objective is None else objective.name,
    )


def choose_kind(
    checkpoint: Path, manifest: dict[str, Any], choice: Choice | None, flag: str = "--weights"
) -> Literal["ema", "master"]:
    """Under which prefix the chosen weights lie in a checkpoint; one that holds weights only has just one kind.

    Args:
        checkpoint: the checkpoint's folder.
        manifest: the checkpoint's manifest.
        choice: average (ema) or raw; None takes the average where there is one.
        flag: by which the user chooses, for the message.

    Raises:
        ConfigError: where the average is asked of a run that kept none.
    """
    if choice == "raw" or not manifest["has_optimizer"] or (choice is None and not manifest["has_ema"]):
        return "master"
    require(
        manifest["has_ema"],
        f"{checkpoint} holds no weight average: take its raw weights with {flag} raw.",
    )
    return "ema"


def describe_origin(checkpoint: Path, manifest: dict[str, Any], kind: Literal["ema", "master"]) -> str:
    """What the weights of a kind are, in words ("average of runs/a/checkpoints/step_00001000")."""
    if "origin" in manifest:
        return str(manifest["origin"])
    if kind == "master":
        return f"raw weights of {checkpoint}"
    optimizer, steps = manifest["run"].get("optimizer", {}), manifest["progress"]["applied_steps"]
    known = {key: optimizer[key] for key in ("ema_decay", "ema_warmup") if key in optimizer}
    average = OptimizerConfig(**known).average_decay
    young = f", {average.initial_share(steps):.0%} of which is still the weights that its run began with"
    return f"average of {checkpoint}{young if known and average.is_young(steps) else ''}"


def write_weights(weights: Weights, folder: Path) -> None:
    """Write a checkpoint that holds weights only, for ``--init_from``; it appears in one piece or not at all.

    Raises:
        ConfigError: where ``folder`` exists.
    """
    description = {
        "progress": asdict(Progress()),
        "has_optimizer": False,
        "has_ema": False,
        "origin": weights.origin,
        "run": {"model": asdict(weights.model)},
    }
    state = {f"master.{name}": value for name, value in weights.tensors.items()}
    state |= {f"buffer.{name}": value for name, value in weights.buffers.items()}
    write_state(folder, state, weights.model, description)


def write_state(folder: Path, state: dict[str, Tensor], model: ModelConfig, description: dict[str, Any]) -> None:
    """Write whole tensors as a checkpoint of one process, in one piece or not at all.

    Args:
        folder: the folder to write; it must not exist.
        state: by kind and name ("master.NAME", "exp_avg.NAME", "buffer.NAME", ...), in the parameters' shapes.
        model: whose fused projections are stored section by section.
        description: what the manifest says besides the files.

    Raises:
        ConfigError: where ``folder`` exists.
    """
    require(not folder.exists(), f"{folder} exists: choose another name for the result.")
    names = {key.partition(".")[2] for key in state}
    layouts = parameter_forms({"model": asdict(model), **description["run"]}, names)
    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = {}
    for key, value in state.items():
        layout = layouts.get(key.partition(".")[2])
        sections = layout.layout.sections if layout else 1
        value = value.to(stored_dtype(value))
        stored[key] = value.view(sections, -1, *value.shape[1:]) if sections > 1 else value
    save_shares(stored, partial)
    files = {path.name: file_facts(path) for path in sorted(partial.glob("*.safetensors"))}
    write_manifest(partial, {**description, "files": files})
    sync_folder(partial)
    partial.rename(folder)


def consolidate(weights: Weights, path: Path) -> None:
    """Write weights and buffers as one fp32 safetensors file, with the model's config in its metadata.

    Raises:
        ConfigError: where ``path`` exists.
    """
    require(not path.exists(), f"{path} exists: choose another name for the result.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    metadata = {"format": "pt", "model": json.dumps(asdict(weights.model)), "origin": weights.origin}
    metadata |= {"objective": weights.objective} if weights.objective else {}
    tensors = {**weights.tensors, **weights.buffers}
    write_safetensors(
        {name: value.to(stored_dtype(value)).contiguous() for name, value in tensors.items()}, partial, metadata
    )
    partial.rename(path)


def read_consolidated(path: Path) -> Weights:
    """The weights of a file that :func:`consolidate` wrote.

    Raises:
        ConfigError: where it is no such file.
    """
    found = unwrap(read_safetensors(path), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    require("model" in metadata, f"{path} does not say what model it holds: it was not written by consolidate.")
    tensors = {name: value.to(stored_dtype(value)) for name, value in found.items()}
    dtypes = {name: value.dtype for name, value in found.items()}
    model, objective = ModelConfig(**json.loads(metadata["model"])), metadata.get("objective")
    return Weights(model, tensors, metadata["origin"], dtypes=dtypes, objective=objective)


class ParameterForm(NamedTuple):
    """Shape of a whole parameter, and how tensor parallelism splits it."""

    shape: torch.Size
    layout: ParameterLayout


def trunk_layouts(model: ModelConfig, masked: bool) -> dict[str, ParameterForm]:
    """Every trunk parameter of a model, without its memory.

    Args:
        model: the model's config.
        masked: whether the objective gives it a mask token.
    """
    with torch.device("meta"):
        trunk = Trunk(model, mask_ratio=0.5 if masked else 0.0)
    return {f"trunk.{name}": ParameterForm(param.shape, layout_of(param)) for name, param in trunk.named_parameters()}


def parameter_forms(run: Mapping[str, Any], names: Collection[str]) -> dict[str, ParameterForm]:
    """Every parameter of a run's trunk, and of what its objective adds to it, without their memory.

    No head of another task is split over the tensor-parallel ranks, or fused.

    Args:
        run: the config as nested plain values.
        names: of the parameters that there are.
    """
    model = ModelConfig(**run["model"])
    objective = read_objective(run)
    if objective is None or isinstance(objective, NepaObjective):
        return trunk_layouts(model, MASK_TOKEN in names)
    with torch.device("meta"):
        whole = build_objective(model, objective, Build())
    return {name: ParameterForm(param.shape, layout_of(param)) for name, param in whole.named_parameters()}


def load_whole(checkpoint: Path, keys: Iterable[str], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, read by this process alone, as they are stored.

    Args:
        checkpoint: the checkpoint's folder.
        keys: which, by kind and name.
        stored: :func:`stored_tensors` of the checkpoint.
    """
    state = {key: torch.empty_like(stored[key], device="cpu") for key in keys}
    load_shares(state, checkpoint)
    return state


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by kind and name, whole, with shape and dtype but without memory (meta device)."""
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in read_entries(checkpoint).items()
    }


def names_of(kind: str, stored: Iterable[str]) -> list[str]:
    """The names under which a kind ("master", "buffer", ...) of tensor is among a checkpoint's keys."""
    return [key.removeprefix(f"{kind}.") for key in stored if key.startswith(f"{kind}.")]
