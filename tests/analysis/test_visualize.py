"""The tool: from any checkpoint to figures and arrays, and a sentence for what it cannot show."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_nepa.analysis.images import load_image
from megatron_nepa.analysis.maps import compute_maps
from megatron_nepa.checkpoint.conversion.release_folder import write_release
from megatron_nepa.checkpoint.reading.weights import Weights, consolidate
from tests.analysis.models import MODEL, PHOTOGRAPH, write_run
from tests.training.test_figures import pixels

TOOL = Path(__file__).parents[2] / "tools/visualize_attention.py"
QUERY, NEXT, BLANK = "#d9730d", "#22d3ee", "#f3f4f6"


class Place:
    """A run of three checkpoints, the same weights in other formats, and two images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.weights = write_run(self.run, [10, 20, 30])
        newest = Weights(MODEL, self.weights[30]["ema"], "average of a run")
        write_release(newest, folder / "release")
        consolidate(newest, folder / "one.safetensors")
        self.image = folder / "wide.jpg"
        Image.fromarray(PHOTOGRAPH[:300, :450]).save(self.image)
        Image.fromarray(PHOTOGRAPH).save(folder / "square.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the tool; returns the files that it wrote, or the sentence with which it ended."""

    def run(*arguments: Any) -> list[Path] | str:
        monkeypatch.setattr("sys.argv", [str(TOOL), *map(str, arguments)])
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as ended:
            said = capsys.readouterr().err.removesuffix("\n")
            return said if ended.code == 2 else f"{ended.code}: {said}"
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return run


def picture(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)


def test_a_checkpoint(place: Place, call: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = call(place.image, "--checkpoint", place.run, "--query", "1,2", "2,4", "--out", out)
    assert [path.name for path in written] == ["wide.npz", "wide.png", "wide_prediction.png"]
    assert sorted(out.iterdir()) == sorted(written)  # and nothing half-written beside

    arrays = np.load(written[0])
    image = load_image(place.image, MODEL)
    expected = compute_maps(Weights(MODEL, place.weights[30]["ema"], ""), image, [(1, 2), (2, 4)])
    np.testing.assert_array_equal(arrays["image"], image)
    assert arrays["patch_size"] == 14
    for name, value in expected.arrays().items():
        np.testing.assert_array_equal(arrays[name], value)

    triplets, prediction = (picture(path) for path in written[1:])
    assert all(pixels(triplets, colour) > 300 for colour in (QUERY, NEXT))
    assert pixels(triplets, BLANK) > 10000  # the future
    assert pixels(prediction, QUERY) == 0


def test_every_format_and_either_kind_of_weights(place: Place, call: Any, tmp_path: Path) -> None:
    found = {}
    for name, arguments in {
        "average": [place.run],
        "raw": [place.run, "--weights", "raw"],
        "release": [place.folder / "release"],
        "file": [place.folder / "one.safetensors"],
        "older": [place.run / "checkpoints/step_00000010"],
    }.items():
        written = call(place.image, "--checkpoint", *arguments, "--out", tmp_path / name, "--query", "2,2")
        found[name] = np.load(written[0])["similarity"]
    for name in ("release", "file"):
        np.testing.assert_allclose(found[name], found["average"], atol=1e-6)
    for name in ("raw", "older"):
        assert np.abs(found[name] - found["average"]).max() > 0.1


def test_views(place: Place, call: Any, tmp_path: Path) -> None:
    images = [place.image, place.folder / "square.png"]
    common = [*images, "--checkpoint", place.run, "--heads", "each", "--layers", "0,2", "--size", "84"]
    written = call(*common, "--query", "grid:2", "--bidirectional", "--out", tmp_path / "out")
    assert [path.name for path in written[::3]] == ["wide.npz", "square.npz"]
    arrays = [np.load(path) for path in written[::3]]
    assert [part["attention"].shape for part in arrays] == [(3, 2, 4, 6, 9), (3, 2, 4, 6, 6)]  # of every layer and head
    assert not arrays[0]["causal"]
    assert pixels(picture(written[1]), BLANK) < 500
    # four queries of image, two heads and similarity are as many panels as two triplets and a half
    height, width = picture(written[4]).shape[:2]
    assert 0.9 < height / width < 1.3


def test_evolution(place: Place, call: Any, tmp_path: Path) -> None:
    written = call(place.image, "--evolution", place.run, "--query", "2,2", "--out", tmp_path / "out")
    assert [path.name for path in written] == ["wide_evolution.npz", "wide_evolution.png"]
    arrays = np.load(written[0])
    assert arrays["step"].tolist() == [10, 20, 30]
    assert arrays["queries"].tolist() == [[2, 2]]
    image = load_image(place.image, MODEL)
    for i, step in enumerate((10, 20, 30)):
        expected = compute_maps(Weights(MODEL, place.weights[step]["ema"], ""), image, [(2, 2)])
        np.testing.assert_array_equal(arrays["attention"][i], expected.attention)
        np.testing.assert_array_equal(arrays["next_cosine"][i], expected.next_cosine)
    all_rows = picture(written[1]).shape[0]
    written = call(
        place.image, "--evolution", place.run, "--steps", 30, 10, "--query", "2,2", "--out", tmp_path / "two"
    )
    assert np.load(written[0])["step"].tolist() == [10, 30]
    assert picture(written[1]).shape[0] < 0.85 * all_rows


def test_bad_input_is_one_sentence(place: Place, call: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = [place.image, "--checkpoint", place.run, "--out", out]
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "file").write_text("")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "wide.png").write_bytes((place.folder / "square.png").read_bytes())
    cases = {
        "there is no image": ["none.jpg", *good[1:]],
        "lies outside": [*good, "--query", "4,0"],
        "layer 3, but this model has 0 to 2": [*good, "--layers", "1-3"],
        "neither all nor a list": [*good, "--layers", "2-1"],
        "holds no checkpoint:": [place.image, "--checkpoint", place.folder, "--out", out],
        "cannot be read as safetensors": [place.image, "--checkpoint", tmp_path / "text.safetensors", "--out", out],
        "was not written by consolidate": [place.image, "--checkpoint", tmp_path / "other.safetensors", "--out", out],
        "holds no checkpoints: give the OUTPUT_DIR": [place.image, "--evolution", tmp_path, "--out", out],
        "no checkpoint of step 40; there are 10, 20, 30": [
            *[place.image, "--evolution", place.run, "--out", out, "--steps", 10, 40]
        ],
        "several images are called wide": [tmp_path / "wide.png", *good],
        "cannot be made": [*good[:3], "--out", tmp_path / "file"],
    }
    for message, arguments in cases.items():
        said = call(*arguments)
        assert isinstance(said, str), message
        assert message in said
        assert said.startswith("visualize_attention: ")
        assert "\n" not in said
        assert not out.exists()

    assert isinstance(call(*good), list)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "wide.npz exists: choose another folder with --out" in call(*good)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
