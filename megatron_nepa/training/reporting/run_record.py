"""What a run records of itself in its folder, and what it may continue there; log.py writes the numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from megatron_nepa.checkpoint.format.agreement import RankError, on_all_ranks, on_main_rank
from megatron_nepa.checkpoint.reading.resume import Found, find_checkpoint, find_intact
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore
from megatron_nepa.config import ConfigError, RunConfig, require
from megatron_nepa.data.index.index_file import is_index
from megatron_nepa.data.index.mixture_grammar import BLOCK, Part, read_mixture
from megatron_nepa.data.index.pair_layouts import pair_layout
from megatron_nepa.data.index.walk import is_hidden
from megatron_nepa.files import AlreadyHeldError, Hold, replace_text, try_to_write
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.reporting.metrics_file import truncate_metrics

# settings that change where or how fast a run computes, never what; anything else makes it another run
_FREE_FIELDS = {
    "parallel",
    "output_dir",
    "micro_batch_size",
    "resume",
    "save_every",
    "keep_last",
    "keep_every",
    "async_save",
    "log_every",
    "max_skipped_steps",
    "stall_timeout",
    "wandb",
    "wandb_project",
    "profile",
    "compile",
    "kernels",
    "evaluation",
    "probe",
    "data.path",  # the data's fingerprint counts, not where they lie
    "data.on_bad_image",
    "data.max_bad_share",
    "data.num_threads",
    "data.hw_decoder_load",
}
Fingerprint = str | dict[str, str] | None

_MOST_NAMED = 6  # of them in a message
_PACKAGES = (
    "megatron_nepa",
    "torch",
    "deepspeed",
    "triton",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "flash-attn",
)


class RunRecord:
    """OUTPUT_DIR of one run.

    Args:
        run: whose ``output_dir``, ``resume``, ``keep_last`` and ``keep_every`` count.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.path = Path(run.output_dir)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.figures_path = self.path / "figures"
        self.profile_path = self.path / "profile"
        self._hold: Hold | None = None
        self._config = ""  # what was written to config.json
        self.checkpoints = CheckpointStore.of(self.path, run.keep_last, run.keep_every)

    def checkpoint_to_resume(self, topology: Topology, data_fingerprint: Fingerprint) -> Found:
        """The checkpoint that this run continues; every rank calls it, and nothing changes on disk.

        ``--resume auto`` passes over damaged checkpoints, a path that is given must be intact.

        Args:
            topology: this rank's place.
            data_fingerprint: of the training data, by source where there are several, which a run keeps; their folders
                may move.

        Raises:
            ConfigError: where the folder holds another run, ``--resume`` names no checkpoint, all are damaged, or the
                note of the best one is.
        """
        require_writable(self.path, self.checkpoints.folder)
        self._require_apart_from_data()
        resume = self.run.resume
        newest = self.checkpoints.latest()
        self.checkpoints.best()  # a damaged note of it is refused before the first step
        require(
            not (resume == "none" and newest is not None),
            f"--resume none starts afresh, but {self.path} already holds {newest}: choose another --output_dir, "
            "or remove that folder.",
        )
        candidates = self.checkpoints.newest_first()
        if resume not in ("auto", "none"):
            given = find_checkpoint(resume)
            # a path from elsewhere is where this run starts; given again, the run goes on from its own checkpoints
            if newest is None or given.resolve().is_relative_to(self.path.resolve()):
                candidates = [given]
        if newest is not None:
            self._refuse_another_run(data_fingerprint)
        return find_intact(candidates, topology)

    def hw_decoder_load(self) -> float | None:
        """With which the folder's run decodes; None where it holds none, or decodes nothing."""
        if not self.config_path.is_file():
            return None
        recorded = json.loads(self.config_path.read_text())
        # before the decoder was timed it stood in the run's config
        load: float | None = recorded.get("decoder", recorded["run"]["data"])["hw_decoder_load"]
        return load

    def lock(self, topology: Topology) -> None:
        """Create the folder, claim it until this process ends and try to write checkpoints; every rank calls it.

        Raises:
            ConfigError: where another run is writing there, or the folder or its checkpoints cannot be written.
        """

        def claim() -> None:
            self._claim()
            try_to_write(self.checkpoints.folder)  # before the first step, not at the first save

        try:
            on_main_rank(topology, claim)
        except RankError as error:
            raise ConfigError(f"--output_dir {self.path} cannot be claimed ({error}): choose another folder.") from None

    def restore(self, topology: Topology) -> bool:
        """Make the folder, its config.json and the claim on it anew where they were removed; every rank calls it.

        Returns:
            Whether that was so, on every rank.

        Raises:
            RankError: the folder belongs to another run by now, or cannot be written.
        """

        def mend() -> bool:
            if not topology.is_main or self._hold is None:
                return False
            removed = self._hold.is_lost()
            if removed:
                self._hold.release()
                self._claim()
            if self.config_path.is_file():
                if self.config_path.read_text() != self._config:
                    raise OSError(f"{self.config_path} is another run's by now")
                return removed
            replace_text(self.config_path, self._config)
            return True

        return on_all_ranks(topology, mend)[0]

    def _claim(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._hold = Hold(self.path / ".lock")
        except AlreadyHeldError as error:
            raise OSError(f"another run is writing there: {error}") from None
        for note in self._hold.notes:
            print(note, flush=True)

    def unlock(self) -> None:
        """Let another run have the folder; of a run that fails the end of its process does."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    def write(self, topology: Topology, facts: dict[str, Any], step: int) -> None:
        """Clear what a killed run left in the folder, write config.json and cut the metrics back; every rank calls it.

        Args:
            topology: this rank's place.
            facts: that config.json holds besides the run's config, versions and the git commit.
            step: which the run goes on from.

        Raises:
            ConfigError: where the folder cannot be written.
        """

        def write() -> None:
            self.checkpoints.remove_partial()
            content = {"run": self.run.to_dict(), **facts, "versions": _versions(), "git_commit": _git_commit()}
            self._config = json.dumps(content, indent=1)
            replace_text(self.config_path, self._config)
            truncate_metrics(self.metrics_path, step)

        try:
            on_main_rank(topology, write)
        except RankError as error:
            raise ConfigError(
                f"--output_dir {self.path} cannot be written ({error}): make room, or choose another folder."
            ) from None

    def _require_apart_from_data(self) -> None:
        """Refuse a folder among the images: its pictures would be images of the next run, and itself a class."""
        path, output = self.run.data.path, self.path.resolve()
        if path is None:
            return
        for source in (part.path for part in read_mixture(path) or (Part(path, 1.0),)):
            if not os.path.isdir(source) or is_index(source) or pair_layout(Path(source)) is not None:
                continue
            folder = Path(source).resolve()
            require(
                not output.is_relative_to(folder) or is_hidden(output.relative_to(folder).as_posix()),
                f"--output_dir {self.path} lies among the images of {source}, which its pictures would join: choose a "
                "folder elsewhere.",
            )

    def _refuse_another_run(self, data_fingerprint: Fingerprint) -> None:
        if not self.config_path.is_file():
            return
        try:
            recorded = json.loads(self.config_path.read_text())
            theirs, other_path = numbers_of_the_run(recorded["run"]), recorded["run"]["data"]["path"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.config_path} is not a run's config ({error}): choose another --output_dir."
            ) from None
        ours = numbers_of_the_run(self.run.to_dict())
        differing = [
            f"{key} {theirs.get(key)} there, {ours.get(key)} here"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        more = f"; and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
        require(
            not differing,
            f"--output_dir {self.path} holds another run ({'; '.join(differing[:_MOST_NAMED])}"
            f"{more}): choose another folder (--resume PATH starts it from a checkpoint of this one), or "
            "remove this one.",
        )
        recorded_print = recorded.get("data_fingerprint")
        changed = _changed_sources(recorded_print, data_fingerprint)
        require(
            not changed,
            f"--output_dir {self.path} holds a run on another mixture ({'; '.join(changed)}): restore it, or choose "
            "another --output_dir (--resume PATH starts it from a checkpoint of this one).",
        )
        moved = isinstance(recorded_print, dict) and isinstance(data_fingerprint, dict)  # names may be others
        require(
            moved or recorded_print == data_fingerprint,
            f"--output_dir {self.path} holds a run on other images: files were added, removed or changed since, or "
            f"--data is not {other_path}. Restore them, or choose another --output_dir.",
        )


def require_writable(output_dir: Path, *folders: Path) -> None:
    """Refuse what cannot be a run's folder, by what is there; nothing changes on disk.

    Args:
        output_dir: the folder.
        folders: below it, that will be made.

    Raises:
        ConfigError: a file, a link to nothing or to itself, a name that is too long, or a folder without permission.
    """
    for folder in (output_dir, *folders):
        try:
            existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
            lost = next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None)
        except (OSError, RuntimeError) as error:  # a name that is too long, a link that leads to itself
            raise ConfigError(f"--output_dir {output_dir} cannot be a folder ({error}): give another.") from None
        require(lost is None, f"--output_dir {output_dir}: {lost} is a link that leads nowhere; give a folder.")
        require(existing.is_dir(), f"--output_dir {output_dir}: {existing} is a file; give a folder.")
        require(
            os.access(existing, os.W_OK | os.X_OK),
            f"--output_dir {output_dir}: {existing} cannot be written; give another folder.",
        )


def _changed_sources(theirs: Fingerprint, ours: Fingerprint) -> list[str]:
    """How two mixtures differ, source by source; nothing where one of them is none."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return []
    there, here = ({value.rpartition(": ")[0]: name for name, value in side.items()} for side in (theirs, ours))
    changed = []
    for key, name in there.items():
        if key not in here:
            changed.append(f"{name} holds other images" if name in ours else f"{name} is there, not here")
        elif theirs[name] != ours[here[key]]:
            was, now = (side.rpartition(": ")[2] for side in (theirs[name], ours[here[key]]))
            changed.append(f"{name} has {was} of {BLOCK} samples there, {now} here")
    new = [name for key, name in here.items() if key not in there and name not in theirs]
    return changed + [f"{name} is here, not there" for name in new]


def numbers_of_the_run(run: dict[str, Any]) -> dict[str, Any]:
    """The settings, flat, that make two runs compute the same."""
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": item for name, item in value.items() if key not in _FREE_FIELDS})
        else:
            flat[key] = value
    if "trunk.dtype" in flat:  # of a probe before --dtype meant its trunk's
        flat["dtype"] = flat.pop("trunk.dtype")
    if "objective" in run:
        flat.setdefault("objective.name", "nepa")  # the only one there was
    return {key: value for key, value in flat.items() if key not in _FREE_FIELDS}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
