"""What is known of a checkpoint besides its tensors: the run, its classes, its results."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nepa.checkpoint.conversion.huggingface_folder import is_huggingface, read_config
from megatron_nepa.checkpoint.conversion.release_config import names_of_labels
from megatron_nepa.checkpoint.conversion.release_folder import is_release
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import Choice, choose_kind
from megatron_nepa.training.results import read_results

_RESULT_FILES = ("evaluation.json", "neighbours.json")
_MEASURED = ("loss", "val_", "probe_")  # begins of the metrics that say how good a model is


@dataclass(frozen=True)
class RunFacts:
    """A checkpoint's past, as far as its files tell.

    Attributes:
        run: its config as plain values, empty where weights are stored alone.
        step: optimizer step after which it was written, or None.
        samples: images that it has seen.
        classes: names of what its head tells apart, by number; empty where they are not known.
        results: for each evaluation of these weights, its settings and what was measured, by name.
        versions: of the packages that trained it.
        is_release: whether the weights come from the authors' release as they are.
    """

    run: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    samples: int = 0
    classes: tuple[str, ...] = ()
    results: tuple[tuple[dict[str, Any], dict[str, float]], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    is_release: bool = False


def read_facts(path: Path, choice: Choice | None = None) -> RunFacts:
    """The facts of a checkpoint, an OUTPUT_DIR, a released model's folder, one for transformers, or a file of weights.

    Args:
        path: as :func:`~megatron_nepa.checkpoint.conversion.compare.read_any` takes it.
        choice: which of its weights, likewise.
    """
    if path.is_file():
        return RunFacts()
    if is_huggingface(path) or is_release(path):
        return RunFacts(classes=names_of_labels(read_config(path)), is_release=not is_huggingface(path))
    checkpoint = find_checkpoint(str(path))
    manifest = read_manifest(checkpoint)
    run, progress = manifest["run"], manifest["progress"]
    if not manifest["has_optimizer"]:
        return RunFacts(is_release="of the release " in manifest["origin"])
    output_dir = checkpoint.parent.parent
    weights = "ema" if choose_kind(checkpoint, manifest, choice) == "ema" else "raw"
    results = [found for name in _RESULT_FILES for found in _evaluations(output_dir / name, checkpoint, weights)]
    measured = _last_metrics(output_dir / "metrics.jsonl", progress["step"])
    if measured:
        results.append(({"during": f"training, at step {progress['step']}"}, measured))
    return RunFacts(
        run=run,
        step=progress["step"],
        samples=progress["samples"],
        classes=tuple(run.get("classes") or ()),
        results=tuple(results),
        versions=_read_json(output_dir / "config.json").get("versions", {}),
    )


def _evaluations(file: Path, checkpoint: Path, weights: str) -> list[tuple[dict[str, Any], dict[str, float]]]:
    found = []
    for entry in read_results(file):
        settings = dict(entry.get("settings") or {})
        if settings.pop("checkpoint", None) == str(checkpoint.resolve()) and settings.get("weights") in (weights, None):
            settings["data"] = Path(str(settings.get("data"))).name  # the path is the machine's, not the model's
            numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
            found.append((settings, numbers))
    return found


def _last_metrics(file: Path, step: int) -> dict[str, float]:
    with contextlib.suppress(OSError, ValueError):
        for line in reversed(file.read_text().splitlines()):
            row = json.loads(line)
            if row.get("step") == step:
                return {name: value for name, value in row.items() if name.startswith(_MEASURED)}
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        if isinstance(found, dict):
            return found
    return {}
