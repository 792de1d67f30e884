"""Results of a model that is evaluated alone: a file with one entry for each choice of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nepa.checkpoint.conversion.release_folder import holds_average, is_release
from megatron_nepa.checkpoint.format.agreement import RankError, on_main_rank
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import Choice, choose_kind
from megatron_nepa.config import ConfigError, require
from megatron_nepa.files import replace_text, try_to_write
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.reporting.metric_display import describe_result
from megatron_nepa.training.reporting.run_record import require_writable


def identify_weights(source: str, choice: Choice | None) -> dict[str, Any]:
    """Which weights a checkpoint gives, as settings of their results.

    Args:
        source: any checkpoint, as ``--init_from`` takes it.
        choice: the average or the raw weights, where there are both; None takes the average where there is one.

    Returns:
        "checkpoint", an absolute path; "step", None where weights are stored alone; "weights", "ema" or "raw", None
        where one kind is stored alone and only its origin tells which.
    """
    path = Path(source)
    if path.is_file():
        return {"checkpoint": str(path.resolve()), "step": None, "weights": None}
    if is_release(path):
        average = choice != "raw" and holds_average(path)
        return {"checkpoint": str(path.resolve()), "step": None, "weights": "ema" if average else "raw"}
    checkpoint = find_checkpoint(source)
    manifest = read_manifest(checkpoint)
    alone = "origin" in manifest
    kind = "ema" if choose_kind(checkpoint, manifest, choice) == "ema" else "raw"
    return {
        "checkpoint": str(checkpoint.resolve()),
        "step": None if alone else manifest["progress"]["step"],
        "weights": None if alone else kind,
    }


def require_results(path: Path, topology: Topology) -> None:
    """Refuse a file that :func:`write_results` could not write, before anything is evaluated; every rank calls it.

    Raises:
        ConfigError: its folder cannot be made or written, or the file holds something else.
    """
    require_writable(path.parent)

    def try_it() -> None:
        try_to_write(path.parent)
        read_results(path)

    try:
        on_main_rank(topology, try_it)
    except RankError as error:
        raise ConfigError(f"{path} cannot be written ({error}): give another --output_dir.") from None


def write_results(path: Path, origin: str, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
    """Print results and whose they are, and add them to a JSON file, written in one piece; the main rank calls it.

    The file is a list of entries: "settings", "origin" and the results by name. An entry of the same settings is
    replaced, others stay.

    Args:
        path: of the file; a single entry, as older versions wrote it, is kept as the first.
        origin: what the weights are, in words.
        settings: all that the results depend on, as JSON values.
        results: by name.

    Raises:
        ConfigError: where the file cannot be read or written.
    """
    print(origin, *(f"  {describe_result(name, value)}" for name, value in results.items()), sep="\n", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [entry for entry in read_results(path) if entry.get("settings") != settings]
        entries.append({"settings": dict(settings), "origin": origin, **results})
        replace_text(path, json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); the results stand above.") from None


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of :func:`write_results`, the newest last; none where there is no file.

    Raises:
        ConfigError: where it is no such file.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    entries = [found] if isinstance(found, dict) else found
    require(
        isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries),
        f"{path} holds no results of an evaluation: move it away and evaluate again.",
    )
    assert isinstance(entries, list)
    return entries
