"""Export to and import from DeepSpeed's universal checkpoint layout (what its ds_to_universal writes).

    FOLDER/latest_universal                      names the checkpoint
    FOLDER/global_step7/zero/NAME/fp32.pt        whole fp32 master, with how tensor parallelism splits it
    FOLDER/global_step7/zero/NAME/exp_avg.pt     and exp_avg_sq.pt, step.pt
    FOLDER/global_step7/zero/optimizer_state.pt  parameter groups
    FOLDER/global_step7/mp_rank_00_model_states.pt

The layout has no place for the weight average, and DeepSpeed loads no buffers (BatchNorm's running statistics) from it:
they lie beside it in ema.safetensors and buffers.safetensors, and the run in run.json, where DeepSpeed does not look.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_nepa.checkpoint.format.manifest import verify_files
from megatron_nepa.checkpoint.format.safetensors_file import write_safetensors
from megatron_nepa.checkpoint.format.state import MOMENTS, MOMENTUM
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import (
    ParameterForm,
    load_whole,
    names_of,
    parameter_forms,
    stored_tensors,
    write_state,
)
from megatron_nepa.checkpoint.saving.checkpoints_folder import beside
from megatron_nepa.config import ConfigError, JepaObjective, ModelConfig, ObjectiveConfig, read_objective, require
from megatron_nepa.parallel.parameters import REPLICATED

_LATEST, _RUN, _EMA, _BUFFERS = "latest_universal", "run.json", "ema.safetensors", "buffers.safetensors"
_FILES = {"master": "fp32", **{kind: kind for kind in MOMENTS}}


def is_universal(path: Path) -> bool:
    """Whether a folder holds a universal checkpoint."""
    return (path / _LATEST).is_file()


def export_universal(source: Path, folder: Path) -> Path:
    """Write a checkpoint for an engine whose config has ``"checkpoint": {"load_universal": true}``.

    Holds the weight average and one parameter's state in memory.

    Args:
        source: a checkpoint of any grid, or an OUTPUT_DIR for its newest.
        folder: to give to ``engine.load_checkpoint``; must not exist.

    Returns:
        The checkpoint that was exported.

    Raises:
        ConfigError: where ``source`` is no whole checkpoint, or ``folder`` exists.
    """
    require(not folder.exists(), f"{folder} exists: choose another name for the result.")
    checkpoint = find_checkpoint(str(source))
    manifest = verify_files(checkpoint)
    require(manifest["has_optimizer"], f"{checkpoint} holds weights only: there is no optimizer's state to export.")
    progress, run, stored = manifest["progress"], manifest["run"], stored_tensors(checkpoint)
    names = names_of("master", stored)
    require(
        not names_of(*MOMENTUM, stored),
        f"{checkpoint} is of a probe that LARS trained: universal checkpoints hold the state of Adam.",
    )
    forms = parameter_forms(run, names)

    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    target = partial / f"global_step{progress['step']}"
    average: dict[str, Tensor] = {}
    for name in names:
        # no head is split over the tensor-parallel ranks
        shape, layout = forms.get(name, ParameterForm(stored[f"master.{name}"].shape, REPLICATED))
        keys = [key for kind in (*_FILES, "ema") if (key := f"{kind}.{name}") in stored]
        parts = {
            key.partition(".")[0]: value.reshape(shape) for key, value in load_whole(checkpoint, keys, stored).items()
        }
        if "ema" in parts:
            average[name] = parts.pop("ema")
        (target / "zero" / name).mkdir(parents=True)
        split = {"cat_dim": layout.split_dim or 0, "param_n_sub_params": layout.sections}
        for kind, value in parts.items():
            torch.save({"param": value, **split}, target / "zero" / name / f"{_FILES[kind]}.pt")
        # torch's AdamW counts in a tensor, and DeepSpeed hands it on as it is
        torch.save(torch.tensor(float(progress["applied_steps"])), target / "zero" / name / "step.pt")
    torch.save(
        _optimizer_state(run["optimizer"], progress, read_objective(run)),
        target / "zero/optimizer_state.pt",
    )
    torch.save(_model_states(progress), target / "mp_rank_00_model_states.pt")
    if average:
        write_safetensors(average, target / _EMA)
    buffers = load_whole(checkpoint, [f"buffer.{name}" for name in names_of("buffer", stored)], stored)
    if buffers:
        write_safetensors(buffers, target / _BUFFERS)
    description = {key: value for key, value in manifest.items() if key not in ("files", "format_version")}
    (target / _RUN).write_text(json.dumps(description, indent=1))
    (partial / _LATEST).write_text(target.name)
    partial.rename(folder)
    return checkpoint


def import_universal(folder: Path, target: Path) -> str:
    """Turn an export, perhaps trained on elsewhere and converted by ds_to_universal, into a checkpoint to resume from.

    Holds the whole state in memory. Data go on where the count of applied steps says.

    Args:
        folder: with ``latest_universal``.
        target: the checkpoint's folder; must not exist.

    Returns:
        What was imported, in words.

    Raises:
        ConfigError: where a file is missing or needs pickle, or the tensors do not fit the model.
    """
    source = folder / (folder / _LATEST).read_text().strip()
    require(
        (source / _RUN).is_file(),
        f"{source} has no {_RUN}, which says what run it belongs to: copy it from the export that it came from.",
    )
    description = json.loads((source / _RUN).read_text())
    model = ModelConfig(**description["run"]["model"])
    found = sorted(path.parent.name for path in source.glob("zero/*/fp32.pt"))
    forms = parameter_forms(description["run"], found)
    missing = forms.keys() - set(found)
    left_over = {name for name in set(found) - forms.keys() if name.startswith("trunk.")}  # else of a task's head
    require(
        not missing and not left_over,
        f"{source} does not fit its model: missing {sorted(missing) or 'nothing'}, "
        f"left over {sorted(left_over) or 'nothing'}.",
    )
    state: dict[str, Tensor] = {}
    for name in found:
        for kind, file in _FILES.items():
            path = source / "zero" / name / f"{file}.pt"
            if kind == "master" or path.is_file():  # a frozen parameter has no moments
                value = _load(path)["param"]
                state[f"{kind}.{name}"] = value.reshape(forms[name].shape) if name in forms else value
    if (source / _BUFFERS).is_file():
        state |= load_file(source / _BUFFERS)
    average = load_file(source / _EMA) if (source / _EMA).is_file() else {}
    state |= {f"ema.{name}": value for name, value in average.items()}

    progress, run = dict(description["progress"]), description["run"]
    steps = {int(_load(path)) for path in source.glob("zero/*/step.pt")}
    require(len(steps) == 1, f"the parameters of {source} are of different steps: {sorted(steps)}.")
    trained = steps.pop() - progress["applied_steps"]
    progress["applied_steps"] += trained
    progress["step"] += trained
    progress["samples"] += trained * run["global_batch_size"]
    note = ""
    if trained and average:
        # the average stood still while DeepSpeed trained on: it is no average of these weights any more
        state |= {f"ema.{name}": state[f"master.{name}"].clone() for name in average}
        note = f"; the weight average starts anew from the weights, {trained} steps were trained without it"
    write_state(target, state, model, {**description, "progress": progress, "has_ema": bool(average)})
    return f"step {progress['step']} of {source}{note}"


def _optimizer_state(
    optimizer: dict[str, Any], progress: dict[str, int], objective: ObjectiveConfig | None
) -> dict[str, Any]:
    import deepspeed

    common = {
        "betas": (optimizer["beta1"], optimizer["beta2"]),
        "eps": optimizer["eps"],
        "step": progress["applied_steps"],  # where DeepSpeed's FusedAdam counts
        "params": [],
    }
    decays = {"decay": optimizer["weight_decay"], "no_decay": 0.0}
    if isinstance(objective, JepaObjective):  # whose trunk has groups of its own
        decays |= {f"head, {kind}": decay for kind, decay in decays.items()}
    groups = [{"name": name, "weight_decay": decays[name], **common} for name in sorted(decays)]
    return {"param_groups": groups, "ds_version": deepspeed.__version__, "clip_grad": optimizer["clip_grad"]}


def _model_states(progress: dict[str, int]) -> dict[str, Any]:
    return {
        "module": {},  # the weights come from zero/
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": progress["step"],
        "global_samples": progress["samples"],
        "skipped_steps": progress["step"] - progress["applied_steps"],
        "lr_scheduler": None,
        "optimizer": None,
    }


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{path} is refused: it cannot be loaded without running code from it ({reason}).") from None
