"""ONNX and .pt2 graphs compute what the training code does at any batch, and nothing else is written."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_nepa.config import ConfigError
from megatron_nepa.export import graph as graphs
from megatron_nepa.export.graph import build_graph, write_graph
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.models.segmenter import Segmenter
from tests.export.models import CLASSES, EXAMPLES, difference, expected, random_segmenter, random_weights, some_images

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
# one of every structure: an export takes seconds
CHOSEN = (
    "quickstart",
    "nepa_b",
    "nepa_b_release",
    "nepa_l_release",
    "imagenet_ft_b",
    "imagenet_ft_b_release",
    "no QK-norm, no LayerScale",
    "positions beside a BOS token",
    "no RoPE, bidirectional",
)
REST = tuple(name for name in EXAMPLES if name not in CHOSEN)


def run_onnx(file: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()})), strict=True))


@pytest.mark.parametrize("name", [*CHOSEN, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_onnx_computes_the_same(name: str, tmp_path: Path) -> None:
    weights, file = random_weights(EXAMPLES[name]), tmp_path / "model.onnx"
    notes = write_graph(weights, RunFacts(classes=CLASSES), file)
    assert notes[0].startswith("pixel_values [batch, 3, 56, 56] in [-1, 1] to ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    images = some_images(weights.model, 3)
    wanted, found = expected(weights, images), run_onnx(file, images)
    if wanted.logits is not None:
        assert difference(found["logits"], wanted.logits) < 1e-4
    else:
        assert difference(found["tokens"], wanted.tokens) < 1e-4
        assert difference(found["last"], wanted.tokens[:, -1]) < 1e-4
        assert difference(found["mean"], wanted.tokens[:, int(weights.model.bos_token) :].mean(1)) < 1e-4


def test_pt2_needs_no_package_and_any_size_of_rotary_positions(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["imagenet_ft_b_release"])
    write_graph(weights, RunFacts(classes=CLASSES), tmp_path / "model.pt2", "features", image_size=84)
    extra = {"classes": "", "preprocess": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert '"crane, bird"' in extra["classes"]
    assert '"BitImageProcessor"' in extra["preprocess"]
    images = some_images(weights.model, 3, side=84)
    assert difference(program(images)[0], expected(weights, images).tokens) < 1e-5


def test_weights_too_large_for_one_file_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_LARGEST_ONNX", 0)
    weights = random_weights(EXAMPLES["nepa_b"])
    write_graph(weights, RunFacts(), tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    images = some_images(weights.model)
    assert difference(run_onnx(tmp_path / "model.onnx", images)["tokens"], expected(weights, images).tokens) < 1e-4


def test_learned_positions_are_resampled_to_another_size() -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    tokens, *_ = build_graph(weights, image_size=84)(some_images(weights.model, side=84))
    assert tokens.shape == (2, 36, 48)


@torch.no_grad()
def test_a_segmenters_window(tmp_path: Path) -> None:
    model = replace(EXAMPLES["ade20k_upernet_b"].model, image_size=84)
    weights = random_segmenter(model)
    segmenter = Segmenter(model, len(CLASSES)).eval()
    segmenter.load_state_dict({**weights.tensors, **weights.buffers})
    write_graph(weights, RunFacts(), tmp_path / "model.onnx")
    images = some_images(model, 3)
    wanted = segmenter(images, torch.arange(3))
    assert difference(run_onnx(tmp_path / "model.onnx", images)["logits"], wanted) < 1e-4


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    other = build_graph(replace(weights, model=replace(weights.model, causal=False)))
    monkeypatch.setattr(graphs, "_run_pt2", lambda file: other)
    with pytest.raises(ConfigError, match=r"tokens of the graph at batch 1 differs from the training code by 0\."):
        write_graph(weights, RunFacts(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(EXAMPLES["nepa_b"])
    with pytest.raises(ConfigError, match=r"ends in neither \.onnx nor \.pt2"):
        write_graph(weights, RunFacts(), tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="have no head that gives masks: ask for features"):
        build_graph(weights, "masks")
    with pytest.raises(ConfigError, match="image_size 60 is not a multiple of the patch's side 14: take 56 or 70"):
        build_graph(weights, image_size=60)
    with pytest.raises(ConfigError, match="hold no trunk"):
        build_graph(replace(weights, tensors={"classifier.weight": torch.ones(2, 2)}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"to_onnx needs onnx, onnxscript, onnxruntime.*pip install .*\[onnx\]"):
        graphs.require_onnx()
