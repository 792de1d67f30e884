"""Checkpoints on disk: complete or absent, newest named by ``latest``, old ones removed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from megatron_nepa.checkpoint.state import TrainState, collect_state, empty_state, restore_state, set_optimizer_step
from megatron_nepa.config import ConfigError, require

FORMAT_VERSION = 1
_STATE_FILE = "state.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done, skipped ones included.
        samples: samples consumed; the whole state of the data.
        applied_steps: steps that changed the weights.
        skipped_in_a_row: newest steps that did not, because a gradient was not finite.
    """

    step: int = 0
    samples: int = 0
    applied_steps: int = 0
    skipped_in_a_row: int = 0


class CheckpointStore:
    """The ``checkpoints`` folder of a run.

    Args:
        folder: OUTPUT_DIR/checkpoints.
        keep_last: newest checkpoints that are kept; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, train: TrainState, progress: Progress, zero_stage: int, run: dict[str, Any]) -> Path:
        """Write a checkpoint; every rank calls it. A failure leaves the older checkpoints as they were.

        Args:
            train: what is saved.
            progress: where the run stands.
            zero_stage: that wrote it, for information.
            run: the run's config as plain values.

        Returns:
            The checkpoint's folder.
        """
        topology = train.topology
        final = self.folder / f"step_{progress.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier(topology.host_group)
        _quiet_torch_checkpoint()
        dcp.save(
            collect_state(train),
            storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            process_group=topology.host_group,
        )
        if topology.is_main:
            files = {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))}
            state = {
                "format_version": FORMAT_VERSION,
                "progress": asdict(progress),
                "has_ema": train.ema is not None,
                "data_parallel_size": topology.data_size,
                "tensor_parallel_size": topology.tensor.size,
                "zero_stage": zero_stage,
                "files": files,
                "run": run,
            }
            (partial / _STATE_FILE).write_text(json.dumps(state, indent=1))
            _sync_files(partial)
            if final.exists():  # a run that was killed between the rename and the log: the new one is complete
                shutil.rmtree(final)
            partial.rename(final)
            _replace_text(self.folder / "latest", final.name)
            self._remove_old(keep=final)
        dist.barrier(topology.host_group)
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text().strip()
        require(
            (path / _STATE_FILE).is_file(),
            f"{pointer} names {path.name}, which is no complete checkpoint: remove {pointer}, or resume from another with --resume PATH.",
        )
        return path

    def _remove_old(self, keep: Path) -> None:
        if self.keep_last == 0:
            return
        complete = sorted(path for path in self.folder.glob("step_*") if (path / _STATE_FILE).is_file())
        for path in complete[: -self.keep_last]:
            if path != keep:
                shutil.rmtree(path)


def find_checkpoint(path: str) -> Path:
    """The checkpoint that a user means by ``path``: itself, or the newest of a run's folder.

    Raises:
        ConfigError: where there is none.
    """
    folder = Path(path)
    if (folder / _STATE_FILE).is_file():
        return folder
    for candidate in (folder, folder / "checkpoints"):
        newest = CheckpointStore(candidate, keep_last=0).latest()
        if newest is not None:
            return newest
    raise ConfigError(
        f"--resume {path} holds no checkpoint: give a folder such as OUTPUT_DIR/checkpoints/step_00001000, or an OUTPUT_DIR."
    )


def read_description(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, checked against its files.

    Raises:
        ConfigError: for a damaged checkpoint or one of another format.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{checkpoint / _STATE_FILE} cannot be read: {error}.") from None
    require(
        state.get("format_version") == FORMAT_VERSION,
        f"{checkpoint} has format version {state.get('format_version')}; this release reads version {FORMAT_VERSION}.",
    )
    for name, size in state["files"].items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        require(
            found == size,
            f"{checkpoint / name} is {'missing' if found is None else f'{found} bytes'} where {size} bytes were written: "
            "the checkpoint is damaged; resume from another with --resume PATH.",
        )
    return state


def load(train: TrainState, checkpoint: Path, model: dict[str, Any]) -> Progress:
    """Restore a run on any grid from a checkpoint; every rank calls it.

    Args:
        train: filled in place.
        checkpoint: folder of a complete checkpoint.
        model: this run's model config as plain values, which the checkpoint's must equal.

    Raises:
        ConfigError: where the checkpoint is damaged or belongs to another model.
    """
    description = read_description(checkpoint)
    theirs = description["run"]["model"]
    differing = [
        f"{key} {theirs.get(key)} there, {value} here" for key, value in model.items() if theirs.get(key) != value
    ]
    require(not differing, f"{checkpoint} holds another model: {'; '.join(differing)}.")
    require(
        description["has_ema"] or train.ema is None,
        f"{checkpoint} holds no weight average: set --optimizer.ema_decay 0, or start from another checkpoint.",
    )
    state = empty_state(train)
    _quiet_torch_checkpoint()
    reader = HuggingFaceStorageReader(str(checkpoint))
    dcp.load(state, storage_reader=reader, process_group=train.topology.host_group)
    restore_state(train, state)
    progress = Progress(**description["progress"])
    set_optimizer_step(train, progress.applied_steps)
    return progress


def _sync_files(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _quiet_torch_checkpoint() -> None:
    # it reports every save and load as information on the standard logger
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
