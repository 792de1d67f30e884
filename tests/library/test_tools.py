"""tools/embed_images.py and tools/predict.py: the library's numbers, however often they are stopped."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from skimage import data as photographs

import megatron_nepa
from megatron_nepa.checkpoint.reading.weights import Weights, write_weights
from megatron_nepa.config import ConfigError
from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.library import embedding
from megatron_nepa.library.embedding import FeatureChoice, Kind, embed
from megatron_nepa.library.model import NepaModel
from megatron_nepa.library.pictures import find_pictures
from megatron_nepa.library.prediction import predict_classes, predict_masks
from megatron_nepa.models.segmenter import Segmenter
from megatron_nepa.parallel.launcher import Place
from tests.export.models import CLASSES, EXAMPLES, random_weights

PLAIN = FeatureChoice()
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pieces of photographs in two subfolders."""
    root = tmp_path_factory.mktemp("images")
    astronaut = photographs.astronaut()
    for i in range(11):
        (root / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(astronaut[20 * i : 20 * i + 120, 30 * i : 30 * i + 90]).save(root / f"{i % 2}" / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NepaModel:
    path = tmp_path_factory.mktemp("model") / "hf"
    write_huggingface(random_weights(EXAMPLES["imagenet_ft_b_release"]), RunFacts(classes=CLASSES), path)
    return megatron_nepa.load(path)


def embedded(model: NepaModel, folder: Path, out: Path, choice: FeatureChoice, ranks: int = 1) -> None:
    pictures = find_pictures(folder)
    done = [embed(model, pictures, out, choice, Place(rank, ranks), 2, lambda n: None) for rank in range(ranks)]
    assert done[-1] == out


@pytest.mark.parametrize("kind", ["last", "mean", "patches"])
@pytest.mark.parametrize("block", [None, 1])
def test_features_are_the_model_s(
    kind: Kind, block: int | None, model: NepaModel, folder: Path, tmp_path: Path
) -> None:
    choice = FeatureChoice(kind, block, batch_size=4)
    pictures = find_pictures(folder)
    images = torch.stack([model.preprocess(pictures.read(i)) for i in range(11)])
    if block is None:
        wanted = getattr(model.forward_features(images), kind)
    else:
        (patches,) = model.forward_intermediates(images, [block], output_fmt="NLC", intermediates_only=True)
        wanted = {"last": patches[:, -1], "mean": patches.mean(1), "patches": patches}[kind]
    for ending in (".npy", ".safetensors", ".parquet"):
        out = tmp_path / f"features{ending}"
        embedded(model, folder, out, choice)
        if ending == ".parquet":
            table = parquet.read_table(out)
            names = table["file"].to_pylist()
            found = np.array(table["features"].to_pylist(), np.float32).reshape(wanted.shape)
        else:
            names = (tmp_path / f"{out.name}.names.txt").read_text().splitlines()
            found = np.load(out) if ending == ".npy" else load_file(out)["features"]
        assert names == [pictures.names[i] for i in range(11)]
        assert np.allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
        assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_stopped_and_shared_work_ends_with_the_same_file(
    model: NepaModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_PART_IMAGES", 2)
    choice, pictures = FeatureChoice(batch_size=2, dtype="float16"), find_pictures(folder)
    embedded(model, folder, tmp_path / "whole.npy", choice)
    embedded(model, folder, tmp_path / "three.npy", choice, ranks=3)

    for done_before in (0, 3, 6, 10):
        out = tmp_path / f"stopped_{done_before}.npy"
        seen = 0

        def stop(count: int, limit: int = done_before) -> None:
            nonlocal seen
            seen += count
            if seen > limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            embed(model, pictures, out, choice, Place(), 2, stop)
        assert not out.exists()
        embedded(model, folder, out, choice)
        assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "three.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_what_cannot_be_embedded(model: NepaModel, folder: Path, tmp_path: Path) -> None:
    pictures = find_pictures(folder)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "a.jpg").write_bytes((folder / "0" / "0.jpg").read_bytes()[:900])
    (tmp_path / "list.txt").write_text("missing.jpg\n")
    (tmp_path / "there.npy").write_bytes(b"")

    def run(out: str, choice: FeatureChoice = PLAIN, source: Path = folder) -> None:
        embed(model, find_pictures(source), tmp_path / out, choice, Place(), 1, lambda n: None)

    for call, message in (
        (lambda: run("there.npy"), "exists: choose another name"),
        (lambda: run("features.csv"), r"must end in \.npy, \.safetensors, \.parquet"),
        (lambda: run("a.npy", FeatureChoice(block=7)), "the model has 3"),
        (lambda: run("b.npy", source=cut), r"a\.jpg cannot be read"),
        (lambda: find_pictures(tmp_path / "list.txt"), "1 of 1 files that are not there"),
        (lambda: find_pictures(tmp_path / "nowhere"), "does not exist"),
        (lambda: FeatureChoice(batch_size=0), "batch_size is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, pictures, tmp_path / "c.npy", FeatureChoice(), Place(), 1, stop)
    with pytest.raises(ConfigError, match="begun with other kind: give the same settings to continue"):
        run("c.npy", FeatureChoice("mean"))


def test_classes_of_unlabelled_images(model: NepaModel, folder: Path, tmp_path: Path) -> None:
    pictures = find_pictures(folder)
    images = torch.stack([model.preprocess(pictures.read(i)) for i in range(11)])
    wanted = model.classify(images).softmax(-1).detach().sort(dim=-1, descending=True)
    predict_classes(model, pictures, tmp_path / "a.csv", 2, 4, 2, lambda n: None)
    predict_classes(model, pictures, tmp_path / "a.jsonl", 2, 4, 2, lambda n: None)
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for i, (row, line) in enumerate(zip(table, lines, strict=True)):
        assert row["file"] == line["file"] == pictures.names[i]
        assert row["class"] == line["classes"][0]["class"] == CLASSES[wanted.indices[i, 0]]
        assert row["class_2"] == CLASSES[wanted.indices[i, 1]]
        assert float(row["probability"]) == pytest.approx(wanted.values[i, 0].item(), abs=1e-4)
    with pytest.raises(ConfigError, match="exists"):
        predict_classes(model, pictures, tmp_path / "a.csv", 2, 4, 2, lambda n: None)


def test_masks_of_unlabelled_images(folder: Path, tmp_path: Path) -> None:
    config = replace(EXAMPLES["nepa_b_release"].model, num_layers=4)
    state = {name: value.clone() for name, value in Segmenter(config, 5).state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    for name, value in state.items():
        if name.startswith("decoder") and value.ndim > 0:
            state[name] = torch.rand(value.shape, generator=generator) + (0.1 if name.endswith("var") else -0.5)
    parameters = dict(Segmenter(config, 5).named_parameters())
    tensors = {name: value for name, value in state.items() if name in parameters}
    write_weights(
        Weights(config, tensors, "a test's", {name: v for name, v in state.items() if name not in parameters}),
        tmp_path / "segmenter",
    )
    segmenter, pictures = megatron_nepa.load(tmp_path / "segmenter"), find_pictures(folder)
    predict_masks(segmenter, pictures, tmp_path / "masks", 2, lambda n: None)
    image = pictures.read(4)
    logits = segmenter.segment(segmenter.preprocess(image)[None])
    found = Image.open(tmp_path / "masks" / Path(pictures.names[4]).with_suffix(".png"))
    assert found.mode == "P"
    assert found.size == image.size
    resized = torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=False)
    assert (np.asarray(found) == resized.argmax(1)[0].numpy()).mean() > 0.999
    assert len(list((tmp_path / "masks").rglob("*.overlay.jpg"))) == 11


@pytest.mark.parametrize("script", ["embed_images", "predict"])
def test_a_mistake_is_one_sentence(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / f"{script}.py"), str(tmp_path), str(tmp_path / "none"), "--out", "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "does not exist" in done.stderr


def test_a_target_that_cannot_be_written_is_said_before_the_work(
    model: NepaModel, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    pictures = find_pictures(folder)
    with pytest.raises(ConfigError, match="nothing can be written"):
        embed(model, pictures, tmp_path / "file" / "out.npy", PLAIN, Place(0, 1), 1, lambda n: None)
    with pytest.raises(ConfigError, match="nothing can be written"):
        predict_classes(model, pictures, tmp_path / "file" / "out.csv", 1, 4, 1, lambda n: None)
    with pytest.raises(ConfigError, match="nothing can be written"):
        predict_masks(model, pictures, tmp_path / "file", 1, lambda n: None)
    predict_classes(model, pictures, tmp_path / "new" / "out.csv", 1, 4, 1, lambda n: None)
    with pytest.raises(ConfigError, match="threads is 0"):
        predict_classes(model, pictures, tmp_path / "other.csv", 1, 4, 0, lambda n: None)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "new"}  # nothing half written


def test_pixels_of_16_bits_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 999, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "list.txt").write_text("deep.png")
    for source in (tmp_path, tmp_path / "list.txt"):
        with pytest.raises(ConfigError, match=r"deep\.png cannot be read: pixels of mode I;16"):
            find_pictures(source).read(0)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff" + b"0" * 50, b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_damaged_images_are_refused_in_words(content: bytes, tmp_path: Path) -> None:
    """Pillow's name an object in memory."""
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "list.txt").write_text("a.png")
    for source in (tmp_path, tmp_path / "list.txt"):
        with pytest.raises(ConfigError) as error:
            find_pictures(source).read(0)
        said = f"{tmp_path}/a.png cannot be read: it is no image, or a damaged one; repair it or leave it out."
        assert str(error.value) == said
