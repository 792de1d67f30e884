"""Each part of the package imports only those before it, and model files leave process groups to ``parallel``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_nepa"
# as README.md and CONTRIBUTING.md list them
LAYERS = (
    *("config", "recipes", "parallel", "kernels", "models", "data", "checkpoint", "training", "tasks"),
    *("planning", "analysis", "cli", "job", "benchmarks", "doctor"),
)


def files(layer: str) -> list[Path]:
    module = PACKAGE / f"{layer}.py"
    return [module] if module.is_file() else sorted((PACKAGE / layer).glob("*.py"))


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_part_has_a_place() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert parts == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    later = {f"megatron_nepa.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    wrong = [
        f"{file}: {name}" for file in files(layer) for name in imported(file) if ".".join(name.split(".")[:2]) in later
    ]
    assert not wrong


def test_models_know_no_process_groups() -> None:
    wrong = [
        f"{file}: {name}" for file in files("models") for name in imported(file) if name.startswith("torch.distributed")
    ]
    assert not wrong
