"""Probing while pre-training: in the log, and without a trace in the run's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.tasks.pretraining_probe import halves
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.results import read_results
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, Killed, call_script, kill_in_step, make_images, pretrain, read_metrics
from tests.tasks.labelled import make_labelled

NAMES = {f"probe_{kind}{name}" for kind in ("", "ema_") for name in ("knn_top1", "knn_top5", "linear_top1")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    make_images(folder / "images", 16)
    make_labelled(folder / "labelled", 5, ("a", "b", "c", "d", "e", "f"))  # of three colours: two look alike
    return folder


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    return [*TINY, f"--data={folder / 'images'}", f"--output_dir={output}", "--steps=4", "--save_every=2", *more]


def probing(folder: Path) -> list[str]:
    return ["--probe_every=2", f"--probe_data={folder / 'labelled'}", "--probe.neighbours=3", "--probe.pooling=mean"]


def with_and_without(folder: Path, output: Path) -> None:
    """A run without probes, and one that probes, killed before its first checkpoint and after it, and continued."""
    assert pretrain(flags(folder, output / "without")) is None
    whole = TrainingEngine.step
    for step in (2, 4):
        kill_in_step(step)
        with pytest.raises(Killed):
            pretrain(flags(folder, output / "one", *probing(folder)))
        TrainingEngine.step = whole  # type: ignore[method-assign]
    assert pretrain(flags(folder, output / "one", *probing(folder))) is None


def test_a_run_computes_the_same_with_and_without_probes(folder: Path, tmp_path: Path) -> None:
    run_ranks(1, with_and_without, folder, tmp_path)
    run_ranks(2, pretrain, flags(folder, tmp_path / "two", *probing(folder)))
    without, one, two = (read_metrics(tmp_path / name) for name in ("without", "one", "two"))
    numbers = [(row["loss"], row["grad_norm"]) for row in without]
    assert [(row["loss"], row["grad_norm"]) for row in one if "loss" in row] == numbers
    assert [row["step"] for row in one if row.keys() >= NAMES] == [0, 2, 4]
    assert [row["step"] for row in one] == [0, 1, 2, 3, 4]
    assert one[0]["probe_knn_top1"] == one[0]["probe_ema_knn_top1"]  # the average begins as the weights
    assert not any(NAMES & row.keys() for row in without)
    for ours, theirs in zip(one, two, strict=True):
        assert {name: ours.get(name) for name in NAMES} == {name: theirs.get(name) for name in NAMES}
    for name in ("probe_knn_top1", "probe_linear_top1"):
        assert 1 / 6 < one[-1][name] < 1  # a number that could differ, better than a guess
    assert (tmp_path / "one/figures/evaluation.png").is_file()


def continued_on_damage(folder: Path, output: Path, victim: Path) -> str | None:
    """A run that is killed after its checkpoint of step 2, and continued when an image of its probe is damaged."""
    arguments = flags(folder, output, *probing(folder), "--probe_every=4")
    kill_in_step(4)
    with pytest.raises(Killed):
        pretrain(arguments)
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])  # its header is as it was
    return pretrain(arguments)


def test_a_damaged_image_of_the_probe_is_refused_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    """By the process that continues a run, too, whose next probe is steps away."""
    shutil.copytree(folder, tmp_path / "data")
    victim = tmp_path / "data/labelled/e/003.jpg"
    (said,) = run_ranks(1, continued_on_damage, tmp_path / "data", tmp_path / "run", victim)
    assert said is not None
    assert said.startswith(f"RankConfigError: {victim} cannot be decoded")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]


def make_regions(folder: Path, per_class: int, seed: int) -> Path:
    """Pieces of a photograph whose class is the part it was taken from: how much of each is shown decides much."""
    generator = np.random.default_rng(seed)
    for number in range(6):
        (folder / f"{number}").mkdir(parents=True)
        for i in range(per_class):
            top, left = generator.integers(0, 160, 2) + 160 * np.array([number // 3, number % 3])
            piece = photographs.astronaut()[top : top + 120, left : left + 150]
            Image.fromarray(piece).save(folder / f"{number}" / f"{i}.png")
    return folder


def probe_both_ways(folder: Path, output: Path) -> None:
    """Pre-train with a probe at its end, and classify by the neighbours of what it saved."""
    from examples.linear_probe import main

    sets = [f"--probe_data={folder / 'train'}", f"--probe_validation_data={folder / 'others'}"]
    assert pretrain(flags(folder, output, "--probe_every=4", *sets)) is None
    shape = json.loads((output / "config.json").read_text())["run"]["model"]
    unread = ("drop_path", "init_std", "freeze_patch_embedding", "rope_rescale", "rope_rescale_group")
    given = [f"--model.{name}={str(value).lower()}" for name, value in shape.items() if name not in unread]
    given += [f"--trunk={output}", "--dtype=fp32", "--knn", f"--output_dir={output / 'alone'}"]
    given += [f"--data={folder / 'train'}", f"--validation_data={folder / 'others'}"]
    for weights in ("raw", "ema"):
        assert call_script(main, [*given, f"--trunk.weights={weights}"]) is None


def test_neighbours_of_a_checkpoint_are_those_that_the_run_found(folder: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 16)
    make_regions(tmp_path / "train", 8, 0)
    make_regions(tmp_path / "others", 12, 1)
    run_ranks(1, probe_both_ways, tmp_path, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    for kind, alone in zip(("", "ema_"), read_results(tmp_path / "run/alone/neighbours.json"), strict=True):
        found = {name: last[f"probe_{kind}{name}"] for name in ("knn_top1", "knn_top5")}
        assert found == {name: alone[name] for name in found}
        assert (alone["settings"]["resize_size"], alone["settings"]["k"]) == (64, 20)  # 56 / 0.875
        assert 1 / 6 < found["knn_top1"] < 1


def refusals(folder: Path, output: Path, cases: list[list[str]]) -> list[str | None]:
    return [pretrain(flags(folder, output, *case)) for case in cases]


def test_bad_input_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    make_labelled(tmp_path / "other", 2, ("blue", "violet"))
    make_labelled(tmp_path / "single", 1)
    cases = {
        "give --probe_data (a folder": ["--probe_every=2"],
        "give the steps between probes as --probe_every": [f"--probe_data={folder / 'labelled'}"],
        "has images without a label": ["--probe_every=2", f"--probe_data={folder / 'images'}"],
        "the 18 training images": ["--probe_every=2", f"--probe_data={folder / 'labelled'}"],
        "probe.block is 2": [*probing(folder), "--probe.block=2"],
        "6 classes and the validation": [*probing(folder), f"--probe_validation_data={tmp_path / 'other'}"],
        "has one image a class": ["--probe_every=2", f"--probe_data={tmp_path / 'single'}"],
    }
    found = run_ranks(1, refusals, folder, tmp_path / "run", list(cases.values()))[0]
    for reason, message in zip(cases, found, strict=True):
        assert message is not None, reason
        assert message.startswith("ConfigError"), message
        assert reason in message, message
    assert not (tmp_path / "run").exists()


def test_halves_share_every_class(tmp_path: Path) -> None:
    index = scan_folder(make_labelled(tmp_path, per_class=5))
    first, second = halves(index.select(np.random.default_rng(0).permutation(15)))
    assert np.bincount(first.label).tolist() == [3, 3, 3]
    assert np.bincount(second.label).tolist() == [2, 2, 2]
    names = {half.names[i] for half in (first, second) for i in range(len(half))}
    assert len(names) == 15
