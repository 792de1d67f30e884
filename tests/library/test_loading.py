"""What can be loaded, without the packages of training; the pixels of ``preprocess``; windows; the pages' code."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torchvision.transforms import v2

import megatron_nepa
from megatron_nepa.checkpoint.conversion.release_folder import write_release
from megatron_nepa.checkpoint.described import Described
from megatron_nepa.checkpoint.reading.weights import Weights, consolidate, write_weights
from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.decoding.masks import scaled_size
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.evaluation import EvaluationLoader
from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.library.preprocess import evaluation_transform
from megatron_nepa.models.segmenter import Segmenter
from megatron_nepa.models.sliding_window import sliding_window_logits
from megatron_nepa.recipes import CLASSIFICATION_RECIPES
from tests.export.models import CLASSES, EXAMPLES, random_weights, some_images

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_form_gives_the_same_model(tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES["imagenet_ft_b_release"])
    images = some_images(weights.model)
    write_weights(weights, tmp_path / "checkpoint")
    consolidate(weights, tmp_path / "file.safetensors")
    write_release(weights, tmp_path / "release", classes=CLASSES)
    write_huggingface(weights, RunFacts(classes=CLASSES), tmp_path / "transformers")
    wanted = megatron_nepa.load(tmp_path / "checkpoint").classify(images)
    for name in ("file.safetensors", "release", "transformers"):
        model = megatron_nepa.load(str(tmp_path / name))
        assert torch.equal(model.classify(images), wanted), name
        assert model.classes == (() if name == "file.safetensors" else CLASSES)


def test_needs_neither_processes_nor_deepspeed_nor_dali(tmp_path: Path) -> None:
    write_weights(random_weights(EXAMPLES["nepa_b"]), tmp_path / "model")
    found = run_python(
        "import sys, megatron_nepa\n"
        "assert 'torch' not in sys.modules, 'the package alone imports torch'\n"
        "import torch\n"
        "model = megatron_nepa.load('model')\n"
        "model.classes, model(torch.zeros(1, 3, 56, 56))\n"
        "wrong = ('nvidia.dali', 'deepspeed', 'transformers', 'timm', 'wandb', 'matplotlib', 'torchvision')\n"
        "print([name for name in wrong if name in sys.modules], torch.distributed.is_initialized())",
        tmp_path,
    )
    assert found.strip() == "[] False"


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a text file", "a probe", "weights of another shape"])
def test_what_is_no_model(what: str, tmp_path: Path) -> None:
    weights, path = random_weights(EXAMPLES["nepa_b"]), tmp_path / "model"
    if what == "an empty folder":
        path.mkdir()
    elif what == "a text file":
        path.write_text("no weights")
    elif what == "a probe":
        write_weights(replace(weights, tensors={"classifier.weight": torch.ones(2, 2)}), path)
    elif what == "weights of another shape":
        kept = {name: value for name, value in weights.tensors.items() if "blocks.2" not in name}
        write_weights(replace(weights, tensors=kept), path)
    with pytest.raises(ConfigError, match=r"does not exist|holds no checkpoint|safetensors|no trunk|do not fit"):
        megatron_nepa.load(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": "EMA"},
        {"dtype": "bf16"},
        {"dtype": torch.int8},
        {"causal": "no"},
        {"image_size": "56"},
        {"image_size": (56, 56)},
        {"image_size": 57},
        {"device": "tpu"},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    write_weights(random_weights(EXAMPLES["nepa_b"]), tmp_path / "model")
    with pytest.raises(ConfigError, match="|".join([*wrong, "no device"])):
        megatron_nepa.load(tmp_path / "model", **wrong)


def test_preprocess_refuses_what_training_refuses() -> None:
    transform = evaluation_transform(Described(EXAMPLES["nepa_b"].model, {}), 56, keeps_shape=False)
    for wrong in ("photo.jpg", Image.fromarray(np.full((64, 64), 999, np.uint16))):
        with pytest.raises(ConfigError, match=r"takes an image|I;16"):
            transform(wrong)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, odd sides among them, as PNG: no decoder differs."""
    folder = tmp_path_factory.mktemp("pictures")
    astronaut, coffee = photographs.astronaut(), photographs.coffee()
    arrays = {
        "a": astronaut,
        "b": coffee,
        "c": coffee[:301, :517],
        "d": astronaut[:333, :128],
        "e": photographs.camera(),
    }
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("squash", [False, True])
def test_the_resize_of_every_form_and_of_another_size(squash: bool, tmp_path: Path) -> None:
    run = CLASSIFICATION_RECIPES["imagenet_ft_b_release"]().to_dict()
    run["evaluation"] |= {"resize_size": 70, "squash": squash}
    weights = random_weights(EXAMPLES["imagenet_ft_b_release"])
    write_huggingface(weights, RunFacts(run=run, classes=CLASSES), tmp_path / "transformers")
    image = Image.fromarray(photographs.coffee())
    settings = {"evaluation.resize_size": 70, "evaluation.squash": squash}
    wanted = evaluation_transform(Described(weights.model, settings), 56, keeps_shape=False)(image)
    assert torch.equal(megatron_nepa.load(tmp_path / "transformers").preprocess(image), wanted)
    larger = megatron_nepa.load(tmp_path / "transformers", image_size=112).preprocess
    assert larger(image).shape == (3, 112, 112)
    (resize,) = (step for step in larger.transforms if isinstance(step, v2.Resize))
    assert resize.size == ([140, 140] if squash else [140])  # not a crop with black borders


@pytest.mark.parametrize(("resize_size", "squash"), [(64, False), (72, False), (72, True)])
def test_pixels_are_the_evaluation_s(resize_size: int, squash: bool, pictures: Path) -> None:
    index = scan_folder(pictures)
    model = replace(EXAMPLES["nepa_b"].model, image_size=56)
    settings = {"evaluation.resize_size": resize_size, "evaluation.squash": squash}
    transform = evaluation_transform(Described(model, settings), 56, keeps_shape=False)
    config, device = DataConfig(num_threads=1), torch.device("cpu")
    loader = EvaluationLoader(index, config, 56, resize_size, squash, len(index), 0, 1, device, torch.float32)
    batch = next(iter(loader))
    for image, number in zip(batch.images, batch.image_index.tolist(), strict=True):
        found = transform(Image.open(pictures / index.names[number]))
        apart = (found - image).abs() * 127.5  # in grey levels
        assert apart.max() <= 8
        assert apart.mean() < 0.6, index.names[number]


def test_a_segmenter_s_pixels_keep_their_shape(pictures: Path) -> None:
    index = scan_folder(pictures)
    settings = {"crops.longer_side": 200, "crops.shorter_side": 80}
    transform = evaluation_transform(Described(EXAMPLES["nepa_b"].model, settings), 56, keeps_shape=True)
    for number, name in enumerate(index.names):
        one = slice(number, number + 1)
        wanted = scaled_size(index.width[one], index.height[one], (200, 80), np.ones(1))[0]
        assert list(transform(Image.open(pictures / name)).shape) == [3, *wanted], name


@torch.no_grad()
def test_segment_slides_windows_over_every_image(tmp_path: Path) -> None:
    model = replace(EXAMPLES["nepa_b_release"].model, num_layers=4)
    training = Segmenter(model, 5).eval()
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.rand(value.shape, generator=generator) - 0.3 for name, value in training.state_dict().items()}
    state = {name: value.abs() + 0.5 if name.endswith("running_var") else value for name, value in state.items()}
    training.load_state_dict(state)
    parameters = dict(training.named_parameters())
    tensors = {name: value for name, value in state.items() if name in parameters}
    buffers = {name: value for name, value in state.items() if name not in parameters}
    write_weights(Weights(model, tensors, "a test's", buffers), tmp_path / "model")
    images = torch.rand(2, 3, 70, 121, generator=generator) * 2 - 1
    found = megatron_nepa.load(tmp_path / "model").segment(images)
    for image, logits in zip(images, found, strict=True):
        wanted = sliding_window_logits(
            lambda window: training(window, torch.zeros(1, dtype=torch.int64)), image[None], 56, 37
        )
        assert torch.allclose(logits[None], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_the_page_s_code_runs(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "coffee", "cat", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(tmp_path / "photos" / f"{name}.jpg")
    Image.fromarray(photographs.astronaut()).save(tmp_path / "photo.jpg")
    example = replace(EXAMPLES["nepa_b_release"].model, num_layers=4)
    write_weights(random_weights(EXAMPLES["nepa_b_release"]._replace(model=example)), tmp_path / "runs" / "quickstart")
    page = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 6
    printed = run_python("\n".join(blocks), tmp_path)
    assert "astronaut.jpg is most like" in printed
    assert "was the least expected" in printed
    from_hub = f"import torch\nprint(torch.hub.load({str(ROOT)!r}, 'nepa', 'runs/quickstart', source='local').origin)"
    assert "random weights of a test" in run_python(from_hub, tmp_path)
