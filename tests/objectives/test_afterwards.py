"""After pre-training: what takes a run's trunk takes that of any objective, and says what it left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from PIL import Image

from megatron_nepa.analysis.images import load_image, to_tensor
from megatron_nepa.analysis.reconstruction import pixel_model
from megatron_nepa.analysis.visualize import View, visualize
from megatron_nepa.checkpoint.conversion.compare import compare, read_any
from megatron_nepa.checkpoint.conversion.release_folder import write_release
from megatron_nepa.checkpoint.reading.weights import consolidate, read_weights, write_weights
from megatron_nepa.models.draws import prefix_lengths
from megatron_nepa.objectives.aim import AimForPretraining
from megatron_nepa.objectives.pixels import pixel_targets
from megatron_nepa.training.results import read_results
from tests.analysis.models import PHOTOGRAPH
from tests.distributed.ranks import run_ranks
from tests.runs import call_script, make_images, pretrain, read_metrics
from tests.tasks.labelled import TINY, finetune, make_labelled

TRUNK = [flag for flag in TINY if flag.startswith(("--model", "--dtype", "--data.num"))]
ADDED = {
    "aim": ["--recipe=aim_b", "--model.bos_token=true", "--objective.head_layers=1"],
    "mae": [
        "--recipe=mae_b",
        "--model.mlp=gelu",
        "--objective.decoder_hidden_size=16",
        "--objective.decoder_layers=1",
        "--objective.decoder_heads=2",
        "--objective.decoder_mlp_hidden_size=16",
    ],
    "jepa": [
        "--recipe=jepa_b",
        "--model.mlp=gelu",
        "--objective.predictor_hidden_size=16",
        "--objective.predictor_num_layers=1",
        "--objective.predictor_num_heads=2",
    ],
}
MODULES = {"aim": "pixel_head", "mae": "pixel_decoder", "jepa": "predictor"}


def probe(arguments: list[str]) -> str | None:
    from examples.linear_probe import main

    return call_script(main, arguments)


def train_all(folder: Path) -> dict[str, list[str | None]]:
    """Pre-train with each objective, fine-tune its trunk and probe it: what each script said."""
    said = {}
    labelled = [f"--data={folder / 'train'}", f"--validation_data={folder / 'validation'}"]
    for name, added in ADDED.items():
        run = folder / name
        batch = ["--steps=2", "--global_batch_size=8", "--micro_batch_size=4"]
        said[name] = [pretrain([*TRUNK, *added, *batch, f"--data={folder / 'images'}", f"--output_dir={run}"])]
        # the checkpoint says what model it is; the recipes of MAE keep no average
        tuned = [flag for flag in TINY if not flag.startswith("--model")]
        tuned += [*labelled, f"--init_from={run}", f"--output_dir={run}_tuned", "--steps=1"]
        tuned += {"aim": [], "mae": ["--init_weights=raw", "--model.causal=false"], "jepa": ["--model.causal=false"]}[
            name
        ]
        said[name].append(finetune(tuned))
        probed = [flag for flag in TINY if flag.startswith(("--evaluation", "--dtype", "--data"))]
        probed += [*labelled, f"--trunk={run}", f"--output_dir={run}_probed", "--knn=3"]
        probed += ["--trunk.weights=raw"] if name == "mae" else []
        said[name].append(probe(probed))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each objective, and what came of their trunks."""
    folder = tmp_path_factory.mktemp("afterwards")
    make_images(folder / "images", 16)
    make_labelled(folder / "train", 4)
    make_labelled(folder / "validation", 2)
    said = run_ranks(1, train_all, folder)[0]
    assert said == {name: [None] * 3 for name in ADDED}
    return folder


@pytest.mark.parametrize("name", ADDED)
def test_its_trunk_is_fine_tuned_and_probed(name: str, folder: Path) -> None:
    (row,) = (row for row in read_metrics(folder / f"{name}_tuned") if "val_top1" in row)
    assert row["step"] == 1
    (probed,) = read_results(folder / f"{name}_probed/neighbours.json")
    assert 0 <= probed["knn_top1"] <= 1
    tuned = read_weights(folder / f"{name}_tuned")
    assert tuned.model.causal == (name == "aim")
    assert {tensor.partition(".")[0] for tensor in tuned.tensors} == {"trunk", "classifier"}


@pytest.mark.parametrize("name", ADDED)
def test_trunks_are_compared_and_what_is_left_is_said(name: str, folder: Path, tmp_path: Path) -> None:
    weights = read_weights(folder / name)
    consolidate(weights, tmp_path / "whole.safetensors")
    same = compare(folder / name, tmp_path / "whole.safetensors")
    assert (same.output, same.losses, same.left_out) == ("feature", None, ())
    assert same.differences(0.0) == []
    trunk = {tensor: value for tensor, value in weights.tensors.items() if tensor.startswith("trunk.")}
    assert len(same.tensors) == len(weights.tensors) > len(trunk)

    write_weights(replace(weights, tensors=trunk, objective=None), tmp_path / "trunk")
    found = compare(folder / name, tmp_path / "trunk")
    assert found.left_out == (
        f"{MODULES[name]}.* ({len(weights.tensors) - len(trunk)} tensors) of A's objective, {name}",
    )
    assert found.differences(0.0) == []
    trunk["trunk.norm.bias"] = trunk["trunk.norm.bias"] + 1
    write_weights(replace(weights, tensors=trunk, objective=None), tmp_path / "other")
    assert compare(folder / name, tmp_path / "other").differences(0.5) == ["trunk.norm.bias by 1", "a feature by 1"]


def test_a_release_takes_the_trunk_of_aim(folder: Path, tmp_path: Path) -> None:
    notes = write_release(read_weights(folder / "aim"), tmp_path / "release")
    assert notes == ["left out, of the objective aim: pixel_head.* (10 tensors)"]
    found = compare(folder / "aim", tmp_path / "release")
    assert found.differences(0.0) == []


def test_aim_draws_what_it_predicts_after_a_prefix(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "astronaut.png"
    Image.fromarray(PHOTOGRAPH).save(image)
    written = visualize([image], folder / "aim", tmp_path / "out", View(square=True))
    height, width = matplotlib.image.imread(written[-1]).shape[:2]
    assert width > 2 * height  # four panels
    assert [path.name for path in written] == ["astronaut.npz", "astronaut.png", "astronaut_reconstruction.png"]

    weights = read_any(folder / "aim")
    model = pixel_model(folder / "aim", weights)
    assert isinstance(model, AimForPretraining)
    pixels, index = to_tensor(load_image(image, weights.model, square=True)), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        found = model.reconstruct(pixels, index)
        _, rows, _ = model.predict(pixels, index)
    # what lies after the prefix is predicted by the row before it, and brought to the patch's own mean and variance
    first = int(prefix_lengths(weights.model.num_patches, model.trunk.seed, index))
    assert found.hidden[0].tolist() == [patch >= first for patch in range(weights.model.num_patches)]
    patches = pixel_targets(pixels, weights.model.patch_size, normalize=False)[0]
    assert torch.equal(found.patches[0, :first], patches[:first])
    for patch in range(first, weights.model.num_patches):
        spread = (patches[patch].var() + 1e-6).sqrt()
        expected = rows[patch - 1 + int(weights.model.bos_token)] * spread + patches[patch].mean()
        torch.testing.assert_close(found.patches[0, patch], expected)
