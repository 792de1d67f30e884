"""Finding the checkpoint that a run continues, and restoring it on any grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_nepa.checkpoint.format.agreement import on_all_ranks
from megatron_nepa.checkpoint.format.manifest import STATE_FILE, DamagedCheckpointError, verify_files
from megatron_nepa.checkpoint.format.state import TrainState, empty_state, restore_state, set_optimizer_step
from megatron_nepa.checkpoint.format.torch_checkpoint import load_shares, read_entries
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.config import ConfigError, RunConfig, read_objective, require
from megatron_nepa.data.sampling.order import require_known_order
from megatron_nepa.parallel.topology import Topology

_REMEDY = "restore one, name another with --resume PATH, or start afresh in another --output_dir"


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run continues.

    Attributes:
        checkpoint: a verified one, or None for a fresh start.
        damage: what was wrong with newer ones, which it stands in for.
        manifest: the checkpoint's, empty for a fresh start.
    """

    checkpoint: Path | None
    damage: tuple[str, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)


def find_intact(candidates: list[Path], topology: Topology, remedy: str = _REMEDY) -> Found:
    """The first of ``candidates`` whose files are what was written; a collective that reads them, each rank a share.

    Args:
        candidates: folders of checkpoints, the one that is wanted most first.
        topology: this rank's place.
        remedy: what to do where none is intact, for the message.

    Raises:
        ConfigError: where there are candidates and none is intact.
    """
    damage: list[str] = []
    for checkpoint in candidates:
        manifest: dict[str, Any] = {}
        facts = on_all_ranks(topology, partial(_damage, checkpoint, topology, manifest))
        fact = next((fact for fact in facts if fact is not None), None)
        if fact is None:
            return Found(checkpoint, tuple(damage), manifest)
        damage.append(fact)
    require(
        not damage,
        f"no checkpoint is intact ({'; '.join(damage)}): {remedy}.",
    )
    return Found(None)


def find_checkpoint(path: str) -> Path:
    """The checkpoint that a user means by ``path``: itself, or the newest of a run's folder.

    Raises:
        ConfigError: where there is none.
    """
    folder = Path(path)
    if (folder / STATE_FILE).is_file():
        return folder
    for store in (CheckpointStore(folder), CheckpointStore.of(folder)):
        newest = store.latest()
        if newest is not None:
            return newest
    require(not folder.is_file(), f"{path} is a file, not a checkpoint's folder: give the folder.")
    pickles = sorted(file.name for ending in ("bin", "pth", "pt") for file in folder.glob(f"*.{ending}"))
    require(
        not pickles,
        f"{path} holds no checkpoint but {', '.join(pickles[:1])}, a pickle, which could run code when read: have "
        "its tensors saved as safetensors.",
    )
    raise ConfigError(
        f"{path} holds no checkpoint: give a folder such as OUTPUT_DIR/checkpoints/step_00001000, or an OUTPUT_DIR."
    )


def load(train: TrainState, checkpoint: Path, manifest: dict[str, Any], run: dict[str, Any]) -> Progress:
    """Restore a run on any grid from a checkpoint; every rank calls it.

    Args:
        train: filled in place.
        checkpoint: folder of a complete checkpoint.
        manifest: that checkpoint's manifest.
        run: this run's config as plain values, whose model and objective the checkpoint's must be.

    Raises:
        ConfigError: where the checkpoint belongs to another model, task or objective, or to a run in an unknown order.
    """
    require(
        manifest["has_optimizer"],
        f"{checkpoint} holds weights only: start a run from it with --init_from instead of --resume.",
    )
    require_known_order(manifest["progress"].get("order", 1), str(checkpoint))
    theirs = manifest["run"]["model"]
    differing = [
        f"{key} {theirs.get(key)} there, {value} here"
        for key, value in run["model"].items()
        if theirs.get(key) != value
    ]
    require(not differing, f"{checkpoint} holds another model: {'; '.join(differing)}.")
    written, asked = (read_objective(config) for config in (manifest["run"], run))
    if written is not None and asked is not None:
        require(
            written.name == asked.name,
            f"{checkpoint} is of the objective {written.name}, this run of {asked.name}: start from its trunk with "
            "--init_from instead of --resume.",
        )
    state = empty_state(train)
    stored = read_entries(checkpoint)
    missing = state.keys() - stored.keys()
    average = {key for key in missing if key.startswith("ema.")}
    missing -= average
    require(
        not missing,
        f"{checkpoint} is of another task, it holds no {min(missing, default='').partition('.')[2]}: start from its "
        "weights with --init_from instead of --resume.",
    )
    require(
        not average,
        f"{checkpoint} holds no weight average: set --optimizer.ema_decay 0, or start from another checkpoint.",
    )
    for key, value in state.items():
        there, name = tuple(getattr(stored[key], "size", ())), key.partition(".")[2]
        require(
            there == tuple(value.shape),
            f"{checkpoint} is of another task, its {name} has the shape {there}, here {tuple(value.shape)}: start from "
            "its weights with --init_from instead of --resume.",
        )
    load_shares(state, checkpoint, train.topology.host_group)
    restore_state(train, state)
    progress = Progress(**{"order": 1, **manifest["progress"]})  # older checkpoints name none
    set_optimizer_step(train, progress.applied_steps)
    return progress


def describe_grid_change(written: dict[str, Any], topology: Topology, zero_stage: int, run: RunConfig) -> str:
    """What is spread otherwise than in a checkpoint's manifest ("data parallel 2 -> 4, ZeRO 2 -> 1"), or ""."""
    theirs = written["run"]
    pairs = {
        "data parallel": (written["data_parallel_size"], topology.data_size),
        "tensor parallel": (written["tensor_parallel_size"], topology.tensor.size),
        "sequence parallel": (theirs["parallel"]["sequence_parallel"], run.parallel.sequence_parallel),
        "ZeRO": (written["zero_stage"], zero_stage),
        "micro-batch": (theirs["micro_batch_size"], run.micro_batch_size),
    }
    return ", ".join(f"{name} {before} -> {now}" for name, (before, now) in pairs.items() if before != now)


def _damage(checkpoint: Path, topology: Topology, manifest: dict[str, Any]) -> str | None:
    """What is wrong with this rank's share of a checkpoint, or None; fills ``manifest``."""
    try:
        manifest.update(verify_files(checkpoint, topology.rank, topology.world_size))
    except DamagedCheckpointError as error:
        return error.fact
    except (ConfigError, OSError) as error:  # of another version, or on a disk that fails
        return str(error).rstrip(".")
    return None
