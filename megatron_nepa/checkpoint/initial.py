"""``--init_from``: a run whose first weights are another checkpoint's, with a fresh optimizer at step 0."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from megatron_nepa.checkpoint.manifest import read_manifest
from megatron_nepa.checkpoint.release_folder import is_release
from megatron_nepa.checkpoint.resume import find_checkpoint, find_intact
from megatron_nepa.checkpoint.state import TrainState, empty_weights, restore_weights
from megatron_nepa.checkpoint.store import quiet_torch_checkpoint
from megatron_nepa.checkpoint.weights import Choice, choose_kind, names_of, stored_tensors
from megatron_nepa.config import ModelConfig, require

# parameters that a run may have without their being in the checkpoint: they keep their initial values
_OPTIONAL = ("mask_token", "q_norm", "k_norm")


def start_from(train: TrainState, path: str, choice: Choice, model: ModelConfig) -> str:
    """Set the weights, and the average where the run keeps one; every rank calls it, on any grid.

    Args:
        train: a fresh run.
        path: a checkpoint, an OUTPUT_DIR, or what ``convert_checkpoint.py from_release`` wrote.
        choice: the average or the raw weights, where the checkpoint holds both.
        model: of this run.

    Returns:
        What was done, for the log.

    Raises:
        ConfigError: where the checkpoint is damaged, or its tensors do not fit the model's.
    """
    require(
        not is_release(Path(path)),
        f"--init_from {path} is a released model: convert it first with tools/convert_checkpoint.py from_release.",
    )
    checkpoint = find_checkpoint(path)
    find_intact([checkpoint], train.topology)
    manifest = read_manifest(checkpoint)
    kind = choose_kind(checkpoint, manifest, choice)
    stored = {key: tuple(value.shape) for key, value in stored_tensors(checkpoint).items()}
    prefix = {name: kind for kind in ("master", "buffer") for name in names_of(kind, stored)}
    names = {name: stored[f"{prefix[name]}.{name}"] for name in prefix}

    wanted = empty_weights(train)
    kept = [name for name in wanted if name not in names and name.endswith(_OPTIONAL)]
    problems = [f"missing {name}" for name in wanted if name not in names and name not in kept]
    problems += [f"left over {name}" for name in names if name not in wanted and not name.endswith("mask_token")]
    problems += [
        f"{name} is {names[name]} there, {tuple(value.shape)} here"
        for name, value in wanted.items()
        if name in names and names[name] != tuple(value.shape)
    ]
    require(not problems, f"--init_from {checkpoint} does not fit this model: {'; '.join(problems)}.")

    state = {
        (key if (key := f"{kind}.{name}") in stored else f"{prefix[name]}.{name}"): value
        for name, value in wanted.items()
        if name not in kept
    }
    quiet_torch_checkpoint()
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)), process_group=train.topology.host_group)
    restore_weights(train, {key.partition(".")[2]: value for key, value in state.items()})

    origin = manifest.get("origin") or f"{'average' if kind == 'ema' else 'raw weights'} of {checkpoint}"
    lines = [f"starting from the {origin}"]
    theirs = manifest["run"]["model"]
    differing = [
        f"model.{key} {theirs[key]} there, {getattr(model, key)} here"
        for key in sorted(theirs)
        if theirs[key] != getattr(model, key, None)
    ]
    if kept:
        lines.append(f"  not in it, so at their initial values: {', '.join(kept)}")
    if differing:
        lines.append(f"  its model differs: {'; '.join(differing)}")
    return "\n".join(lines)
