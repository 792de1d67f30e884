"""Checkpoints on disk: complete or absent, newest named by ``latest``, old ones removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_nepa.checkpoint.format.agreement import RankError, on_all_ranks, on_main_rank
from megatron_nepa.checkpoint.format.manifest import file_facts, write_manifest
from megatron_nepa.checkpoint.format.state import TrainState, collect_state
from megatron_nepa.checkpoint.format.torch_checkpoint import save_shares
from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.sampling.order import ORDER_VERSION
from megatron_nepa.files import replace_text
from megatron_nepa.parallel.topology import Topology

CHECKPOINTS = "checkpoints"  # the folder of them in an OUTPUT_DIR
_STEP = "step_"
_BEST_REMEDY = "restore it, or remove it to have the best checkpoint chosen anew"
# what file systems answer that sync no folders (CIFS, some FUSE); a full or broken disk answers otherwise
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the older ones are as they were."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done, skipped ones included.
        samples: samples consumed; with order and mixture the whole state of the data.
        applied_steps: steps that changed the weights.
        skipped_in_a_row: newest steps that did not, because a gradient was not finite.
        order: version of the order that the run's images come in.
        mixture: of a run on several sources, what their samples are a function of besides seed and k
            (:mod:`megatron_nepa.data.sampling.mixture_state`).
    """

    step: int = 0
    samples: int = 0
    applied_steps: int = 0
    skipped_in_a_row: int = 0
    order: int = ORDER_VERSION
    mixture: dict[str, Any] | None = None


class CheckpointStore:
    """A folder of checkpoints.

    Args:
        folder: where they stand; of a run :meth:`of` knows it.
        keep_last: newest checkpoints that are kept; 0 keeps all.
        keep_every: checkpoints of steps that this divides are kept as well; 0 keeps none of them.
    """

    def __init__(self, folder: Path, keep_last: int = 0, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    @classmethod
    def of(cls, output_dir: Path, keep_last: int = 0, keep_every: int = 0) -> CheckpointStore:
        """The checkpoints of the run in an OUTPUT_DIR."""
        return cls(output_dir / CHECKPOINTS, keep_last, keep_every)

    def save(self, train: TrainState, progress: Progress, zero_stage: int, run: dict[str, Any]) -> Path:
        """Write a checkpoint; every rank calls it. It appears under its name in one piece, or not at all.

        Args:
            train: what is saved.
            progress: where the run stands.
            zero_stage: ZeRO stage of the run that writes it, for information.
            run: the run's config as plain values.

        Returns:
            The checkpoint's folder.

        Raises:
            SaveError: on every rank, where one could not write; the older checkpoints are as they were.
        """
        partial = PartialCheckpoint(self, train, progress, zero_stage, run, train.topology)
        with partial.complete_or_absent():
            partial.begin()
            partial.write(collect_state(train))
            partial.finish()
        return partial.final

    def path_of(self, step: int) -> Path:
        """Where the checkpoint after a step stands, or would."""
        return self.folder / f"{_STEP}{step:08d}"

    def newest_first(self) -> list[Path]:
        """The checkpoint that ``latest`` names, there or not, and the older ones; all where it names none."""
        found = sorted(
            (path for path in self.folder.glob(f"{_STEP}*") if path.is_dir() and _is_step(path)), reverse=True
        )
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = (self.folder / "latest").read_text().strip()
            if _is_step(Path(name)):
                return [self.folder / name, *(path for path in found if path.name < name)]
        return found

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return next(iter(self.newest_first()), None)

    def best(self) -> Path | None:
        """The checkpoint that was marked as the best, or None.

        Raises:
            ConfigError: where ``best.json`` is damaged: without it the best checkpoint would be removed as an old one.
        """
        path = self.folder / str(self._best_entry().get("checkpoint"))
        return path if path.is_dir() else None

    def best_value(self) -> float | None:
        """What the best checkpoint was measured to reach, or None."""
        value = self._best_entry().get("value")
        return value if self.best() is not None and isinstance(value, int | float) else None

    def best_metric(self) -> str:
        """The name of what the best checkpoint was measured by, or ""."""
        return str(self._best_entry().get("metric", ""))

    def mark_best(self, path: Path, metric: str, value: float) -> None:
        """Keep a checkpoint beyond ``keep_last``, until a better one is marked; the main rank calls it.

        Args:
            path: a checkpoint in this folder.
            metric: name of what was measured.
            value: what it reached.
        """
        entry = {"checkpoint": path.name, "metric": metric, "value": value}
        replace_text(self.folder / "best.json", json.dumps(entry, indent=1) + "\n")

    def _best_entry(self) -> dict[str, Any]:
        path = self.folder / "best.json"
        try:
            entry = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): {_BEST_REMEDY}.") from None
        complete = isinstance(entry, dict) and isinstance(entry.get("checkpoint"), str)
        require(
            complete and isinstance(entry.get("value"), int | float),
            f"{path} names no checkpoint and its value: {_BEST_REMEDY}.",
        )
        return dict(entry)

    def remove_partial(self) -> None:
        """Remove what a save or removal that was cut short left behind."""
        for path in self.folder.glob(f".{_STEP}*.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def publish(self, partial: Path, final: Path) -> None:
        """Give a complete checkpoint its name, move ``latest`` there and remove old ones; the main rank calls it."""
        if final.exists():  # of a run that was continued from an older checkpoint
            _discard(final)
        partial.rename(final)
        replace_text(self.folder / "latest", final.name)
        sync_folder(self.folder)
        if self.keep_last > 0:
            best = self.best()
            for path in self.newest_first()[self.keep_last :]:
                is_milestone = self.keep_every and step_of(path) % self.keep_every == 0
                if not is_milestone and path != best:
                    _discard(path)


class PartialCheckpoint:
    """A checkpoint that is being written beside its place; every rank calls its methods, which agree on the host.

    Args:
        store: the folder of checkpoints in which it will stand.
        train: what is saved.
        progress: where the run stands.
        zero_stage: ZeRO stage of the run that writes it, for information.
        run: the run's config as plain values.
        topology: this rank's place, whose ``host_group`` the agreements use.
    """

    def __init__(
        self,
        store: CheckpointStore,
        train: TrainState,
        progress: Progress,
        zero_stage: int,
        run: dict[str, Any],
        topology: Topology,
    ) -> None:
        self.store = store
        self.topology = topology
        self.step = progress.step
        self.final = store.path_of(progress.step)
        self.path = beside(self.final)
        self.description = {
            "progress": asdict(progress),
            "has_optimizer": True,
            "has_ema": train.ema is not None,
            "data_parallel_size": topology.data_size,
            "tensor_parallel_size": topology.tensor.size,
            "zero_stage": zero_stage,
            "run": run,
        }

    @contextlib.contextmanager
    def complete_or_absent(self) -> Iterator[None]:
        """Where a rank fails inside the block, remove what was written and raise :class:`SaveError` on every rank."""
        try:
            yield
        except RankError as error:
            if self.topology.is_main:
                shutil.rmtree(self.path, ignore_errors=True)  # it may be what fills the disk
            raise SaveError(
                f"the checkpoint of step {self.step} could not be written ({error}): make room or repair "
                f"{self.store.folder}; the same command continues from {self.store.latest() or 'the start'}."
            ) from error

    def begin(self) -> None:
        """Create its folder."""

        def create() -> None:
            self.store.remove_partial()
            self.path.mkdir(parents=True)

        on_main_rank(self.topology, create)

    def write(self, state: dict[str, Any]) -> None:
        """Write this rank's tensors, of :func:`collect_state`."""
        save_shares(state, self.path, self.topology.host_group)

    def finish(self) -> None:
        """Checksum the files that were written, add the manifest and publish."""

        def seal() -> None:
            write_manifest(self.path, {**self.description, "files": files})
            sync_folder(self.path)
            self.store.publish(self.path, self.final)

        # a rank reads back what it wrote itself: on a network disk the others may not see it yet
        mine = f"shard-{self.topology.rank + 1:05d}-*.safetensors"
        found = on_all_ranks(self.topology, lambda: {path.name: file_facts(path) for path in self.path.glob(mine)})
        files = {name: facts for part in found for name, facts in sorted(part.items())}
        on_main_rank(self.topology, seal)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint of a :class:`CheckpointStore` was written, by its name."""
    return int(checkpoint.name.removeprefix(_STEP))


def _is_step(path: Path) -> bool:
    return re.fullmatch(rf"{_STEP}\d{{8,}}", path.name) is not None


def beside(path: Path) -> Path:
    """Where a checkpoint is written before it takes the name ``path``."""
    return path.with_name(f".{path.name}.partial")


def _discard(path: Path) -> None:
    # renamed first: a removal that is cut short leaves no half checkpoint under a checkpoint's name
    aside = path.with_name(f".{path.name}.removed.partial")
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where its file system can: some sync files only."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
