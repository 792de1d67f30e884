"""Each part of the package imports only those before it, and model files leave process groups to ``parallel``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_nepa"
# as README.md and CONTRIBUTING.md list them
LAYERS = (
    *("hardware", "files", "imports", "config", "terminal", "recipes", "parallel", "kernels", "models", "objectives"),
    *("data", "checkpoint", "training", "tasks", "timm", "detection", "export", "library", "planning", "analysis"),
    *("cli", "job", "benchmarks", "doctor", "acceptance"),
)
# inside the large rooms, likewise
ROOMS = {
    "kernels": (
        *(
            "launching",
            "record",
            "cached_parts",
            "swiglu",
            "residual_norm",
            "cosine_loss",
            "qk_norm_rope",
            "attention",
            "operations",
            "dispatch",
        ),
        "proofs",
    ),
    "data": ("workers", "transfer", "remote", "index", "sampling", "decoding", "augmentation", "indexing", "loaders"),
    "checkpoint": ("format", "saving", "reading", "conversion", "described", "following", "initial"),
    "training": (
        "stopping",
        "engine",
        "reporting",
        "task",
        "dtype",
        "lost_source",
        "results",
        "evaluation",
        "step",
        "judge",
        "saves",
        "loop",
        "train",
    ),
}


def files(layer: str) -> list[Path]:
    module = PACKAGE / f"{layer}.py"
    return [module] if module.is_file() else sorted((PACKAGE / layer).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(("folder", "parts"), [(PACKAGE, LAYERS), *((PACKAGE / name, ROOMS[name]) for name in ROOMS)])
def test_every_part_has_a_place(folder: Path, parts: tuple[str, ...]) -> None:
    assert {path.stem for path in folder.iterdir() if not path.name.startswith("_")} == set(parts)


def imports_of_later_parts(prefix: str, parts: tuple[str, ...]) -> list[str]:
    """Imports of parts that stand later in the list than the importing file's own; ``prefix`` as "data/"."""
    package = ("megatron_nepa/" + prefix).replace("/", ".")
    return [
        f"{file}: {name}"
        for place, part in enumerate(parts)
        for file in files(prefix + part)
        for name in imported(file)
        if any(f"{name}.".startswith(f"{package}{later}.") for later in parts[place + 1 :])
    ]


def test_imports_point_one_way() -> None:
    assert not imports_of_later_parts("", LAYERS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_inside_a_room_point_one_way(room: str) -> None:
    assert not imports_of_later_parts(f"{room}/", ROOMS[room])


def test_models_know_no_process_groups() -> None:
    wrong = [
        f"{file}: {name}" for file in files("models") for name in imported(file) if name.startswith("torch.distributed")
    ]
    assert not wrong
