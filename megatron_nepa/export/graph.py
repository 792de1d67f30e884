"""A trained model as a graph of operations for other runtimes: ONNX, or torch.export's ``.pt2``.

The graph takes images of one size in batches of any number; the angles and positions of that size are constants of it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_nepa import __version__
from megatron_nepa.checkpoint.reading.modules import Head, at_image_size, build_module, head_of
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import beside
from megatron_nepa.config import one_of, require
from megatron_nepa.export.evaluated import require_equal, sample_images
from megatron_nepa.export.preprocessor import evaluation_preprocessor
from megatron_nepa.export.run_facts import RunFacts

Output = Literal["features", "classes", "masks"]
_INPUT = "pixel_values"
_NAMES: dict[Output, tuple[str, ...]] = {
    "features": ("tokens", "last", "mean"),
    "classes": ("logits",),
    "masks": ("logits",),
}
_HEADS: dict[Output, Head] = {"features": "none", "classes": "classes", "masks": "masks"}
_BATCHES = (1, 2, 5)
_TOLERANCE = 1e-4  # of the largest value
# beyond this a protocol buffer cannot hold the weights: they lie in a file beside it
_LARGEST_ONNX = 1.8e9


class Graph(nn.Module):
    """What is exported: images [B, 3, S, S] to the outputs of a kind.

    Args:
        module: a trunk, classifier or segmenter of the training code.
        output: "features": tokens [B, T, D] after the final LayerNorm, the last one [B, D], and the mean of the patches
            [B, D]; "classes": logits [B, C]; "masks": logits [B, K, S, S] of one window.
    """

    def __init__(self, module: nn.Module, output: Output) -> None:
        super().__init__()
        self.module = module
        self.output = output

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Images in [-1, 1], fp32 [B, 3, S, S], to the outputs."""
        batch = pixel_values.shape[0]
        # numbers of samples serve the draws of training alone
        found = self.module(pixel_values, torch.zeros(batch, dtype=torch.int64, device=pixel_values.device))
        if self.output != "features":
            return (found,)
        tokens = found.output.view(batch, found.period, -1)
        prefix = int(self.module.config.bos_token)  # type: ignore[union-attr, arg-type]
        return tokens, tokens[:, -1], tokens[:, prefix:].mean(dim=1)


def write_graph(
    weights: Weights, facts: RunFacts, path: Path, output: Output | None = None, image_size: int | None = None
) -> list[str]:
    """Write a ``.onnx`` or ``.pt2`` file, run it at batches of 1, 2 and 5, and compare; all of it or nothing.

    Args:
        weights: of a trunk, a classifier or a segmenter.
        facts: of their run.
        path: that must not exist; its ending says the format.
        output: of the graph; None takes what the head gives, or features without one.
        image_size: side of the images; None takes the model's.

    Returns:
        What a user should know of the graph.

    Raises:
        ConfigError: where ``path`` exists, a package is missing, the model has no such output, or the graph computes
            something else than the training code.
    """
    require(path.suffix in (".onnx", ".pt2"), f"{path} ends in neither .onnx nor .pt2, which say the format.")
    require(not path.exists(), f"{path} exists: choose another name for the result.")
    graph = build_graph(weights, output, image_size)
    size = image_size or weights.model.image_size
    images = sample_images(replace(weights.model, image_size=size), max(_BATCHES))
    graph(images[:1])  # has the angles of this size kept: made while tracing they would be no constants
    program = torch.export.export(graph, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    # a run's own resize belongs to its own image size
    shown = evaluation_preprocessor(
        replace(weights.model, image_size=size), facts.run if size == weights.model.image_size else {}
    )
    facts_of_graph = {
        "preprocess": json.dumps(shown),
        "classes": json.dumps(facts.classes),
        "model": json.dumps(vars(weights.model)),
        "exported_by": f"megatron_nepa {__version__}",
    }
    folder = beside(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write, run = (_write_onnx, _run_onnx) if path.suffix == ".onnx" else (_write_pt2, _run_pt2)
        write(program, images[:2], graph.output, folder / path.name, facts_of_graph)
        apart = _compare(graph, run(folder / path.name), images)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the graph itself last
            file.rename(path.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shapes = ", ".join(
        f"{name} {list(value.shape[1:])}" for name, value in zip(_NAMES[graph.output], graph(images[:1]), strict=True)
    )
    return [
        f"{_INPUT} [batch, 3, {size}, {size}] in [-1, 1] to {shapes}",
        f"batches of {one_of(_BATCHES)} differ by {apart:.1g} of the largest value at most",
    ]


def build_graph(weights: Weights, output: Output | None = None, image_size: int | None = None) -> Graph:
    """The module that is exported, in evaluation mode.

    Args:
        weights: of a trunk, a classifier or a segmenter.
        output: None takes what the head gives, or features without one.
        image_size: None takes the model's.

    Raises:
        ConfigError: where the model has no such output, or the size is no multiple of the patch's.
    """
    head = head_of(weights) if output is None else _HEADS[output]
    module = build_module(at_image_size(weights, image_size), head)
    return Graph(module, next(kind for kind, name in _HEADS.items() if name == head)).requires_grad_(False)


def require_onnx() -> None:
    """Refuse to begin without the packages of the extra.

    Raises:
        ConfigError: naming them.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    require(
        not missing,
        f"to_onnx needs {', '.join(missing)}, which is not installed: pip install 'megatron_nepa[onnx]'.",
    )


@torch.no_grad()
def _compare(graph: Graph, run: Any, images: Tensor) -> float:
    apart = 0.0
    for batch in _BATCHES:
        for name, found, wanted in zip(_NAMES[graph.output], run(images[:batch]), graph(images[:batch]), strict=True):
            apart = max(apart, require_equal(found, wanted, _TOLERANCE, f"{name} of the graph at batch {batch}"))
    return apart


def _write_onnx(
    program: torch.export.ExportedProgram, images: Tensor, output: Output, file: Path, facts: dict[str, str]
) -> None:
    require_onnx()
    made = torch.onnx.export(
        program, (images,), dynamo=True, input_names=[_INPUT], output_names=list(_NAMES[output]), verbose=False
    )
    assert made is not None
    made.model.metadata_props.update(facts)
    bytes_of_weights = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    made.save(file, external_data=bytes_of_weights > _LARGEST_ONNX)


def _run_onnx(file: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(found) for found in session.run(None, {_INPUT: images.numpy()})]


def _write_pt2(
    program: torch.export.ExportedProgram, images: Tensor, output: Output, file: Path, facts: dict[str, str]
) -> None:
    torch.export.save(program, file, extra_files=facts)


def _run_pt2(file: Path) -> Any:
    return torch.export.load(file).module()
