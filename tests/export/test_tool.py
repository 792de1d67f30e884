"""convert_checkpoint.py from a run to other formats and back."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from megatron_nepa import terminal
from megatron_nepa.checkpoint.reading.weights import read_weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore
from megatron_nepa.config import DataConfig, ModelConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.loaders.evaluation import EvaluationLoader
from megatron_nepa.data.loaders.pretraining import build_index
from megatron_nepa.export.model_card import model_card
from megatron_nepa.export.preprocessor import PREPROCESSOR_FILE, evaluation_preprocessor
from megatron_nepa.export.run_facts import read_facts
from megatron_nepa.training.results import write_results
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
RELEASABLE = ["--model.position_embedding=none", "--model.bos_token=true", "--objective.mask_ratio=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose trunk every format holds."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*TINY, *RELEASABLE, f"--data={make_images(folder / 'my_images')}", "--steps=1"]
    assert run_ranks(1, pretrain, [*flags, f"--output_dir={folder / 'a'}"]) == [None]
    return folder / "a"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the tool: its exit status and what it printed."""

    def run_tool(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended, terminal.tool(TOOL.stem):
            runpy.run_path(str(TOOL), run_name="tool")["main"]()
        printed = capsys.readouterr()
        return ended.value.code, printed.out or printed.err

    return run_tool


def test_to_transformers_and_back(run: Path, call: Any, tmp_path: Path) -> None:
    assert call("to_hf", run, tmp_path / "hf", "--weights", "raw")[0] == 0
    assert call("from_hf", tmp_path / "hf", tmp_path / "start")[0] == 0
    for other in ("hf", "start"):
        assert call("verify", run, tmp_path / other, "--weights", "raw", "--tolerance=0")[0] == 0
    card = (tmp_path / "hf/README.md").read_text()
    for said in (
        "| recipe | quickstart |",
        "| data | my_images |",
        "| steps | 1, 8 images seen |",
        "| loss | -",
        "torch 2",
    ):
        assert said in card, said
    assert str(tmp_path.parent) not in card, "a path of this machine"
    status, said = call("to_hf", run, tmp_path / "hf")
    assert status == 2
    assert "exists: choose another name" in said
    assert "holds no checkpoint" in call("to_hf", tmp_path, tmp_path / "none")[1]


def test_a_run_starts_from_the_folder(run: Path, call: Any, tmp_path: Path) -> None:
    assert call("to_hf", run, tmp_path / "hf")[0] == 0
    flags = [*TINY, *RELEASABLE, f"--data={run.parent / 'my_images'}", "--steps=1", f"--init_from={tmp_path / 'hf'}"]
    assert run_ranks(1, pretrain, [*flags, f"--output_dir={tmp_path / 'b'}"]) == [None]
    assert call("to_hf", tmp_path / "b", tmp_path / "again")[0] == 0
    card = (tmp_path / "again/README.md").read_text()
    assert "| started from | hf |" in card
    assert "trained on from `hf`, whose licence binds them too" in card


def test_the_card_names_results_of_these_weights_alone(run: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "a"
    shutil.copytree(run, output_dir)
    checkpoint = CheckpointStore.of(output_dir).latest()
    assert checkpoint is not None
    settings = {"checkpoint": str(checkpoint.resolve()), "data": "/data/secret/imagenet/val", "images": 50}
    for weights, top1 in (("ema", 0.75), ("raw", 0.5)):
        write_results(output_dir / "evaluation.json", "x", {**settings, "weights": weights}, {"top1": top1})
    other = {**settings, "checkpoint": "/elsewhere", "weights": "ema"}
    write_results(output_dir / "evaluation.json", "x", other, {"top1": 0.25})
    for choice, top1 in (("ema", 0.75), ("raw", 0.5)):
        facts = read_facts(output_dir, choice)
        card = model_card(read_weights(output_dir, choice), facts, "last")
        assert re.findall(r"\| top1 \| (\S+) \|", card) == [str(top1)]
        assert "data val, images 50" in card
        assert "secret" not in card


def test_a_release_becomes_a_folder_whose_card_says_so(run: Path, call: Any, tmp_path: Path) -> None:
    assert call("to_release", run, tmp_path / "release")[0] == 0
    assert call("to_hf", tmp_path / "release", tmp_path / "hf")[0] == 0
    assert "converted from a model that the authors of NEPA released" in (tmp_path / "hf/README.md").read_text()
    assert call("from_release", tmp_path / "release", tmp_path / "start")[0] == 0
    assert read_facts(tmp_path / "start").is_release


def test_to_timm_and_to_a_graph(run: Path, call: Any, tmp_path: Path) -> None:
    status, out = call("to_timm", run, tmp_path / "timm")
    assert status == 0
    assert "computes the same" in out
    assert "the model is causal" in call("to_timm", run, tmp_path / "stock", "--stock")[1]
    status, out = call("to_onnx", run, tmp_path / "model.pt2")
    assert status == 0
    assert "to tokens [17, 32], last [32], mean [32]" in out
    assert "no head that gives classes" in call("to_onnx", run, tmp_path / "a.pt2", "--output", "classes")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "timm"]


def test_a_release_has_what_its_scripts_load(run: Path, call: Any, tmp_path: Path) -> None:
    assert call("to_release", run, tmp_path / "release")[0] == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "release")
    assert (processor.size["height"], processor.size["width"]) == (56, 56)
    assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("squash", [False, True])
def test_the_processor_shows_the_pixels_of_the_evaluation(squash: bool, tmp_path: Path) -> None:
    data, model = DataConfig(path=str(make_images(tmp_path / "images", 3))), ModelConfig(image_size=56)
    file = tmp_path / "images/000.jpg"
    Image.open(file).resize((144, 96)).save(file, quality=95)
    index = build_index(data, verbose=False)
    assert isinstance(index, DatasetIndex)
    loader = EvaluationLoader(
        index, data, 56, 64, squash, batch_size=3, data_rank=0, data_size=1, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    (batch,) = loader
    settings = evaluation_preprocessor(model, {"evaluation": {"resize_size": 64, "squash": squash}})
    (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [Image.open(index.where(int(i))) for i in batch.image_index]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert np.abs((pixels - batch.images).numpy()).mean() < 0.01
