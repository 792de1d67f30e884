"""One classifier gives the same figures however it is named, under every recipe, without a shape typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_nepa
from megatron_nepa.checkpoint.conversion.release_folder import write_release
from megatron_nepa.checkpoint.reading.weights import consolidate, read_weights
from megatron_nepa.config import DataConfig
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.evaluation import EvaluationLoader
from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import read_facts
from megatron_nepa.recipes import CLASSIFICATION_RECIPES
from tests.distributed.ranks import run_ranks
from tests.runs import call_script, make_images, pretrain
from tests.tasks.labelled import TINY, finetune, make_labelled

SHAPE = [flag for flag in TINY if flag.startswith("--model")]
SHAPE += ["--model.bos_token", "--model.qk_norm=affine", "--model.mlp=gelu"]
COMMON = ["--dtype=fp32", "--data.num_threads=1", "--evaluation.batch_size=4"]
FIGURES = ("top1", "top5", "loss")


def finetune_each(commands: list[list[str]]) -> list[str | None]:
    return [finetune(command) for command in commands]


def probe_each(commands: list[list[str]]) -> list[str | None]:
    from examples.linear_probe import main

    return [call_script(main, command) for command in commands]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images, a pre-trained trunk, and a bidirectional classifier of the patches' mean, in all its forms."""
    folder = tmp_path_factory.mktemp("naming")
    make_labelled(folder / "train", 4)
    make_labelled(folder / "val", 3)
    steps = ["--steps=3", "--base_lr=0.3", "--log_every=1", "--data.num_threads=1", "--optimizer.warmup_ratio=0"]
    trunk = [*SHAPE, "--dtype=fp32", "--global_batch_size=8", "--micro_batch_size=8", *steps]
    images = make_images(folder / "images")
    assert run_ranks(1, pretrain, [*trunk, f"--data={images}", f"--output_dir={folder / 'trunk'}"]) == [None]
    # nothing says the trunk's shape from here on
    flags = [flag for flag in TINY if not flag.startswith(("--model", "--evaluation"))]
    flags += [*steps, "--head.pooling=mean", "--model.causal=false", f"--data={folder / 'train'}"]
    flags += [f"--init_from={folder / 'trunk'}", f"--output_dir={folder / 'run'}"]
    assert run_ranks(1, finetune, flags) == [None]
    weights = read_weights(folder / "run")
    consolidate(weights, folder / "file.safetensors")
    write_release(weights, folder / "release")
    write_huggingface(weights, read_facts(folder / "run"), folder / "huggingface")
    return folder


def last_result(output: Path, name: str) -> dict[str, Any]:
    found = json.loads((output / name).read_text())[-1]
    assert isinstance(found, dict)
    return found


def test_every_name_and_every_recipe_give_the_same_figures(folder: Path) -> None:
    newest = folder / "run/checkpoints/step_00000003"
    # imagenet_ft_l_release squashes images, and only a file and a release do not say how theirs were shown
    named = {
        "run": "imagenet_ft_l_release",
        "file.safetensors": "imagenet_ft_l",
        "release": "imagenet_ft_b_release",
        "huggingface": "imagenet_ft_l_release",
    }
    common = [*COMMON, "--evaluate_only", f"--validation_data={folder / 'val'}"]
    cases = [(folder / name, recipe) for name, recipe in named.items()]
    cases += [(newest, recipe) for recipe in CLASSIFICATION_RECIPES]
    commands = [
        [*common, f"--recipe={recipe}", f"--init_from={source}", f"--output_dir={folder / f'evaluated{i}'}"]
        for i, (source, recipe) in enumerate(cases)
    ]
    assert run_ranks(1, finetune_each, commands)[0] == [None] * len(cases)
    results = [last_result(folder / f"evaluated{i}", "evaluation.json") for i in range(len(cases))]
    for case, found in zip(cases, results, strict=True):
        assert [found[name] for name in FIGURES] == pytest.approx([results[0][name] for name in FIGURES], rel=1e-6), (
            case
        )
    assert results[0]["settings"]["image_size"] == 32
    assert results[0]["settings"]["resize_size"] == 37
    for name in ("run", "file.safetensors", "release", "huggingface"):
        assert classify_by_hand(folder / name, folder / "val") == pytest.approx(
            [results[0][figure] for figure in ("top1", "loss")], rel=1e-5
        )


@torch.no_grad()
def classify_by_hand(source: Path, images: Path) -> list[float]:
    """Accuracy and loss of ``megatron_nepa.load``'s model in a plain loop over the evaluation's pixels."""
    model, hits, losses = megatron_nepa.load(source), [], []
    cpu = torch.device("cpu")
    loader = EvaluationLoader(
        scan_folder(images), DataConfig(num_threads=1), 32, 37, False, 4, 0, 1, cpu, torch.float32
    )
    for batch in loader:
        logits, labels = model.classify(batch.images[batch.valid]), batch.labels[batch.valid]
        hits += (logits.argmax(1) == labels).tolist()
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    return [sum(hits) / len(hits), sum(losses) / len(losses)]


def test_neighbours_and_probes_follow_the_trunk(folder: Path) -> None:
    data = [*COMMON, f"--data={folder / 'train'}", f"--validation_data={folder / 'val'}"]
    names = ("run", "file.safetensors", "release", "huggingface")
    commands = [
        [
            *data,
            "--knn=5",
            "--recipe=quickstart_probe",
            f"--trunk={folder / name}",
            f"--output_dir={folder / f'knn_{name}'}",
        ]
        for name in names
    ]
    batch = ["--steps=2", "--global_batch_size=12", "--micro_batch_size=6", "--trunk.block=1", "--evaluation.squash"]
    commands.append([*data, *batch, f"--trunk={folder / 'trunk'}", f"--output_dir={folder / 'probe'}"])
    # how a probe was shown images, and of which block, is known to its checkpoint
    alone = [*COMMON, f"--validation_data={folder / 'val'}", "--evaluate_only", f"--output_dir={folder / 'probe'}"]
    commands.append([*alone, "--recipe=quickstart_probe", f"--trunk={folder / 'trunk'}"])
    assert run_ranks(1, probe_each, commands)[0] == [None] * len(commands)
    results = [last_result(folder / f"knn_{name}", "neighbours.json") for name in names]
    for found in results:
        assert (found["knn_top1"], found["knn_top5"]) == (results[0]["knn_top1"], results[0]["knn_top5"])
    settings = last_result(folder / "probe", "evaluation.json")["settings"]
    assert (settings["block"], settings["squash"], settings["image_size"]) == (1, True, 32)
    rows = [json.loads(line) for line in (folder / "probe/metrics.jsonl").read_text().splitlines()]
    assert last_result(folder / "probe", "evaluation.json")["top1"] == max(row.get("val_top1", 0) for row in rows)


def test_a_probe_trains_alike_on_a_trunk_of_every_name(folder: Path) -> None:
    names = ("run", "file.safetensors", "release", "huggingface")
    data = [*COMMON, f"--data={folder / 'train'}", f"--validation_data={folder / 'val'}", "--recipe=quickstart_probe"]
    data += ["--steps=3", "--global_batch_size=12", "--micro_batch_size=6", "--evaluation.every=1", "--log_every=1"]
    commands = [
        [*data, f"--trunk={folder / name}", f"--output_dir={folder / f'probe_{name}'}", "--evaluation.resize_size=37"]
        for name in names
    ]
    assert run_ranks(1, probe_each, commands)[0] == [None] * len(names)
    measured = ("loss", "val_top1", "val_loss")
    found = []
    for name in names:
        rows = [json.loads(line) for line in (folder / f"probe_{name}/metrics.jsonl").read_text().splitlines()]
        found.append([row[key] for row in rows for key in measured if key in row])
    assert found == [pytest.approx(found[0], rel=1e-6)] * len(names)
