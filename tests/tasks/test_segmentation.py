"""Fine-tuning to segmentation on made pairs: every grid trains the same model and finds the same scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from skimage import draw

import megatron_nepa
from megatron_nepa.checkpoint.reading.weights import consolidate, load_whole, read_weights, stored_tensors
from megatron_nepa.config import CropConfig, DataConfig, MaskConfig
from megatron_nepa.data.index.pairs import pair_index
from megatron_nepa.data.loaders.segmentation import evaluate_segmentation
from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import read_facts
from megatron_nepa.tasks.segmentation_metrics import ConfusionMatrix
from megatron_nepa.training.results import read_results
from tests.distributed.cases import Outcome, differences
from tests.distributed.ranks import run_ranks
from tests.runs import call_script, read_metrics, without_training

CLASSES = 3
SIDE = 42
# learned positions keep padded patches, which are all zero, away from the norm's epsilon
TINY = [
    f"--masks.num_classes={CLASSES}",
    f"--model.image_size={SIDE}",
    "--model.hidden_size=32",
    "--model.num_layers=3",
    "--model.num_heads=2",
    "--model.mlp_hidden_size=48",
    "--model.layer_scale_init=0.5",
    "--model.drop_path=0.2",
    "--global_batch_size=8",
    "--steps=3",
    "--base_lr=0.032",
    "--optimizer.warmup_ratio=0",
    "--optimizer.eps=1e-4",
    "--optimizer.ema_decay=0.9",
    "--dtype=fp32",
    "--data.num_threads=1",
    "--evaluation.stride=20",
    "--evaluation.overlays=2",
]


def write_pairs(root: Path, split: str, count: int) -> None:
    """Images of coloured rectangles, each class in its colour; the first rows are ignored."""
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        height, width = rng.integers(40, 70, 2)
        labels = np.ones((height, width), np.uint8)
        for _ in range(4):
            top, left = rng.integers(0, 30, 2)
            labels[top : top + 20, left : left + 25] = rng.integers(1, CLASSES + 1)
        labels[:2] = 0
        pixels = np.array([[90, 90, 90], [220, 40, 40], [40, 200, 60], [50, 60, 220]])[labels]
        noisy = (pixels + rng.normal(0, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "images" / split / f"{number:02}.jpg", quality=95)
        Image.fromarray(labels).save(root / "annotations" / split / f"{number:02}.png")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADE20K's layout; 7 validation images, which 2 and 4 ranks do not share evenly."""
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, "training", 12)
    write_pairs(root, "validation", 7)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def finetune(arguments: list[str]) -> str | None:
    """Call the segmentation script's main function on this rank; None, or the error that a user would see."""
    from examples.finetune_segmentation import main

    return call_script(main, arguments)


def train(ranks: int, pairs: Path, out: Path, *flags: str) -> Path:
    arguments = [*TINY, f"--data={pairs}", f"--validation_data={pairs}", f"--output_dir={out}", *flags]
    if "--evaluate_only" in flags:
        arguments = [flag for flag in without_training(arguments) if not flag.startswith("--data=")]
    assert run_ranks(ranks, finetune, arguments) == [None] * ranks
    return out


@pytest.fixture(scope="module")
def one_rank(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank."""
    return train(1, pairs, tmp_path_factory.mktemp("one") / "run", "--micro_batch_size=8", "--save_every=1")


def outcome(run: Path) -> Outcome:
    """Losses and norms of every step, gradients of the first, tensors of the last."""
    rows = read_metrics(run)
    steps = [load_checkpoint(run / "checkpoints" / f"step_{step:08}") for step in (1, len(rows))]
    gradients = {name: value / 0.1 for name, value in steps[0].items() if name.startswith("exp_avg.")}
    return Outcome([row["loss"] for row in rows], [row["grad_norm"] for row in rows], gradients, steps[1])


def load_checkpoint(folder: Path) -> dict[str, Any]:
    stored = stored_tensors(folder)
    return load_whole(folder, stored, stored)


def test_tensor_sequence_and_data_parallel_train_the_same_model(pairs: Path, one_rank: Path, tmp_path: Path) -> None:
    """TP 2 with sequence parallelism x DP 2 at micro-batches of 4, against one rank at 8: BatchNorm sees the same 8."""
    grid = ["--micro_batch_size=4", "--tensor_parallel_size=2", "--sequence_parallel"]
    found = outcome(train(4, pairs, tmp_path / "run", "--save_every=1", *grid))
    expected = outcome(one_rank)
    assert "buffer.decoder.head.fusion.norm.running_var" in expected.state
    assert differences(found, expected) == []


def test_evaluation_is_the_same_on_any_number_of_ranks(pairs: Path, one_rank: Path, tmp_path: Path) -> None:
    """The checkpoint evaluated alone on 2 and 4 ranks has the scores that its run on one rank found."""
    last = read_metrics(one_rank)[-1]
    expected = {name: last[f"val_{name}"] for name in ("mean_iou", "mean_accuracy", "pixel_accuracy")}
    tables = []
    for ranks in (2, 4):
        out = tmp_path / str(ranks)
        train(ranks, pairs, out, "--evaluate_only", f"--init_from={one_rank}", "--init_weights=raw")
        results = read_results(out / "evaluation.json")[-1]
        assert {name: results[name] for name in expected} == expected
        tables.append((out / "segmentation" / "classes.md").read_text())
        assert len(list((out / "segmentation").glob("*.png"))) == 2
    assert tables[0] == tables[1]
    assert "| green |" in tables[0]


def test_every_name_gives_the_scores_of_a_plain_loop(pairs: Path, one_rank: Path, tmp_path: Path) -> None:
    """A run, a file and a folder for transformers of one segmenter, and ``megatron_nepa.load`` of each."""
    weights = read_weights(one_rank, "raw")
    consolidate(weights, tmp_path / "file.safetensors")
    write_huggingface(weights, read_facts(one_rank, "raw"), tmp_path / "huggingface")
    sources = [one_rank, tmp_path / "file.safetensors", tmp_path / "huggingface"]
    scores = []
    for number, source in enumerate(sources):
        choice = ["--init_weights=raw"] if source == one_rank else []
        out = train(1, pairs, tmp_path / f"out{number}", "--evaluate_only", f"--init_from={source}", *choice)
        found = read_results(out / "evaluation.json")[-1]
        scores.append([found[name] for name in ("mean_iou", "mean_accuracy", "pixel_accuracy")])
    by_hand = [score_by_hand(source, pairs) for source in sources]
    assert scores == [pytest.approx(scores[0], rel=1e-6)] * 3
    assert by_hand == [pytest.approx(scores[0], rel=1e-3)] * 3  # a pixel of 7 images may fall to another class


@torch.no_grad()
def score_by_hand(source: Path, pairs: Path) -> list[float]:
    model, matrix = megatron_nepa.load(source, "raw"), ConfusionMatrix(CLASSES, torch.device("cpu"))
    model.stride = 20  # the runs' flag, which weights without their run do not hold
    index, cpu = pair_index(str(pairs), "validation"), torch.device("cpu")
    crops, masks = CropConfig(), MaskConfig(num_classes=CLASSES)
    data = DataConfig(num_threads=1)
    for item in evaluate_segmentation(index, data, crops, masks, SIDE, 0, 1, cpu, torch.float32):
        logits = torch.nn.functional.interpolate(
            model.segment(item.images), item.labels.shape, mode="bilinear", align_corners=False
        )
        matrix.add(item.labels, logits.argmax(1)[0])
    scores = matrix.scores(None)
    return [scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy]


def finetune_each(commands: list[list[str]]) -> list[str | None]:
    return [finetune(arguments) for arguments in commands]


def test_bad_input_is_one_sentence(pairs: Path, one_rank: Path, tmp_path: Path) -> None:
    """What cannot work ends before the first step, and says why."""
    write_pairs(tmp_path / "unlabelled", "training", 2)
    for mask in (tmp_path / "unlabelled" / "annotations" / "training").iterdir():
        mask.unlink()
    write_pairs(tmp_path / "tiny", "training", 2)
    Image.new("RGB", (9, 60)).save(tmp_path / "tiny" / "images" / "training" / "01.jpg")
    nameless = shutil.copytree(pairs, tmp_path / "nameless")
    (nameless / "classes.txt").unlink()
    cases = {
        "segmentation needs image and mask pairs: give --data": [],
        "has a mask of its name in": [f"--data={tmp_path / 'unlabelled'}"],
        "is 9 x 60 pixels, smaller than a patch of model.patch_size 14": [f"--data={tmp_path / 'tiny'}"],
        "but the classes are 1 to 2": [f"--data={nameless}", "--masks.num_classes=2"],
        "names 3 classes, but --masks.num_classes is 4": [
            f"--data={pairs}",
            f"--validation_data={pairs}",
            "--evaluation.stride=28",
            "--masks.num_classes=4",
        ],
        "leaves gaps between windows": [
            f"--data={pairs}",
            f"--validation_data={pairs}",
            "--evaluation.stride=43",
        ],
        "holds another head: decoder.head.classifier.weight": [
            f"--data={nameless}",
            "--masks.num_classes=4",
            f"--init_from={one_rank}",
        ],
        "--model.hidden_size 48, not 32 as in": [
            f"--data={pairs}",
            "--model.hidden_size=48",
            f"--init_from={one_rank}",
        ],
        "keep --evaluation.inference slide": [
            f"--data={pairs}",
            f"--validation_data={pairs}",
            "--evaluation.stride=28",
            "--evaluation.inference=whole",
        ],
        "BatchNorm in training needs more than one value": [f"--data={pairs}", "--micro_batch_size=1"],
    }
    trained_only = [flag for flag in TINY if not flag.startswith("--evaluation.")]  # without validation data
    base = [*trained_only, f"--output_dir={tmp_path / 'run'}", "--micro_batch_size=8"]
    errors = run_ranks(1, finetune_each, [[*base, *flags] for flags in cases.values()])[0]
    for message, error in zip(cases, errors, strict=True):
        assert message in str(error)


def write_shapes(root: Path, split: str, count: int, seed: int) -> None:
    """Discs, squares and triangles, red, blue and yellow, half transparent on photographs."""
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    backgrounds = [photographs.astronaut(), photographs.coffee(), photographs.chelsea(), photographs.rocket()]
    colours = np.array([[230, 60, 50], [60, 120, 230], [240, 200, 60]])
    rng = np.random.default_rng(seed)
    for number in range(count):
        photograph = backgrounds[rng.integers(4)]
        height, width = rng.integers(110, 170, 2)
        top, left = (
            rng.integers(side - extent) for side, extent in zip(photograph.shape, (height, width), strict=False)
        )
        image = photograph[top : top + height, left : left + width].astype(float)
        labels = np.ones((height, width), np.uint8)
        for _ in range(rng.integers(3, 7)):
            kind, radius, y, x = rng.integers(3), rng.integers(16, 34), rng.integers(height), rng.integers(width)
            corners = {1: ((-1, -1, 1, 1), (-1, 1, 1, -1)), 2: ((-1, 1, 1), (0, -1, 1))}.get(kind)
            if corners is None:
                place = draw.disk((y, x), radius, shape=labels.shape)
            else:
                rows, columns = (centre + radius * np.array(side) for centre, side in zip((y, x), corners, strict=True))
                place = draw.polygon(rows, columns, shape=labels.shape)
            shade = colours[kind] + rng.normal(0, 25, 3)
            image[place] = 0.6 * shade + 0.4 * image[place] + rng.normal(0, 8, (len(place[0]), 3))
            labels[place] = kind + 2
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{number:03}.jpg")
        Image.fromarray(labels).save(root / "annotations" / split / f"{number:03}.png")


@pytest.mark.slow
def test_a_segmenter_learns_shapes_on_photographs(tmp_path: Path) -> None:
    """From scratch in 300 steps (a minute on one core); calling everything background would give a mIoU of 0.19."""
    write_shapes(tmp_path, "training", 120, seed=0)
    write_shapes(tmp_path, "validation", 13, seed=1)
    flags = [
        "--masks.num_classes=4",
        "--model.image_size=64",
        "--model.patch_size=8",
        "--model.hidden_size=48",
        "--model.num_layers=4",
        "--model.num_heads=3",
        "--model.mlp_hidden_size=128",
        "--model.layer_scale_init=0.1",
        "--model.drop_path=0.1",
        "--layer_decay.rate=1.0",
        "--base_lr=0.06",
        "--optimizer.warmup_ratio=0.05",
        "--optimizer.eps=1e-8",
        "--optimizer.ema_decay=0",
        "--steps=300",
        "--micro_batch_size=8",
        "--evaluation.stride=none",
    ]
    run = train(1, tmp_path, tmp_path / "run", *flags)
    assert read_metrics(run)[-1]["val_mean_iou"] > 0.5
