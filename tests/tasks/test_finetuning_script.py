"""The classification script as a user runs it: start from a trunk, evaluate, keep the best, stop and continue."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megatron_nepa.checkpoint.reading.weights import read_weights
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.labels import with_labels
from megatron_nepa.data.index.listing import Known
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.tasks.classification import ClassificationEvaluator
from megatron_nepa.training.results import read_results
from tests.distributed.ranks import run_ranks
from tests.runs import call_script, make_images, pretrain, read_metrics, signal_in_step, without_training
from tests.tasks.labelled import TINY, finetune, make_labelled

TRUNK = [flag for flag in TINY if flag.startswith(("--model", "--dtype", "--data.num"))]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run that two tensor-parallel ranks wrote."""
    folder = tmp_path_factory.mktemp("trunk")
    flags = [*TRUNK, "--steps=3", "--global_batch_size=8", "--micro_batch_size=8", "--base_lr=0.1"]
    grid = ["--tensor_parallel_size=2", "--sequence_parallel", "--model.bos_token=false"]
    data = f"--data={make_images(folder / 'images')}"
    assert run_ranks(2, pretrain, [*flags, *grid, data, f"--output_dir={folder / 'run'}"]) == [None, None]
    return folder / "run"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return {"train": make_labelled(folder / "train", 8), "val": make_labelled(folder / "val", 5)}


def flags_of(labelled: dict[str, Path], output_dir: Path) -> list[str]:
    return [
        *TINY,
        "--steps=6",
        "--evaluation.every=2",
        "--keep_last=1",
        "--save_every=1000",
        "--log_every=1",
        "--base_lr=0.2",
        f"--data={labelled['train']}",
        f"--validation_data={labelled['val']}",
        f"--output_dir={output_dir}",
    ]


def evaluating(flags: list[str]) -> list[str]:
    """Evaluate what such a run left."""
    return [*(flag for flag in without_training(flags) if not flag.startswith("--data=")), "--evaluate_only"]


def finetune_stopped(flags: list[str], step: int) -> str | None:
    signal_in_step(step)
    return finetune(flags)


def finetune_stopped_evaluating(flags: list[str], pass_number: int) -> str | None:
    """Stopped by a signal during a pass over the validation images, of which an evaluation takes two."""
    real, calls = ClassificationEvaluator.evaluate, [0]

    def signalled(self: ClassificationEvaluator, model: nn.Module, interrupted: Any) -> Any:
        calls[0] += 1
        if calls[0] == pass_number:
            signal.raise_signal(signal.SIGTERM)
        return real(self, model, interrupted)

    ClassificationEvaluator.evaluate = signalled  # type: ignore[method-assign]
    return finetune(flags)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = re.compile("_ms|per_|mfu|memory")
    return [{key: value for key, value in row.items() if not timed.search(key)} for row in rows]


def test_from_a_trunk_to_an_evaluated_classifier(trunk: Path, labelled: dict[str, Path], tmp_path: Path) -> None:
    flags = flags_of(labelled, tmp_path / "run")
    assert run_ranks(1, finetune, [*flags, f"--init_from={trunk}"]) == [None]
    rows = read_metrics(tmp_path / "run")
    evaluated = [row["step"] for row in rows if "val_top1" in row]
    assert evaluated == [2, 4, 6]
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert best["value"] == max(row[name] for row in rows if "val_top1" in row for name in ("val_top1", "val_ema_top1"))
    assert (tmp_path / "run/checkpoints" / best["checkpoint"]).is_dir()
    kept = {path.name for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert kept == {best["checkpoint"], "step_00000006"}

    # evaluated alone, on two ranks, the best checkpoint reaches what it did in training
    assert run_ranks(2, finetune, evaluating(flags)) == [None, None]
    alone = read_results(tmp_path / "run/evaluation.json")[-1]
    assert alone["top1"] == best["value"]
    assert best["checkpoint"] in alone["origin"]
    step = int(best["checkpoint"].removeprefix("step_"))
    weights = "ema" if best["metric"] == "val_ema_top1" else "raw"
    expected = {"checkpoint": str(tmp_path / "run/checkpoints" / best["checkpoint"]), "step": step, "weights": weights}
    assert expected.items() <= alone["settings"].items()

    # not on images of other classes, though their number is the same
    other = make_labelled(tmp_path / "other_classes", 1, ("blue", "green", "yellow"))
    refused = run_ranks(1, finetune, [*evaluating(flags), f"--validation_data={other}"])[0]
    assert re.search("3 classes apart .* have 3; number 2 is red there, yellow here", refused)

    # nor does another run start from its head for other classes, unless the head is drawn anew
    start = [*flags_of(labelled, tmp_path / "started"), f"--init_from={tmp_path / 'run'}", "--steps=1"]
    of_others = [f"--data={other}", f"--validation_data={other}", "--global_batch_size=2", "--micro_batch_size=2"]
    commands = [
        [*start, *of_others],
        [*start, *of_others, "--reset_head"],
        [*start, f"--output_dir={tmp_path / 'same'}"],
    ]
    outcomes = run_ranks(1, _all, commands)[0]
    assert re.search("3 classes apart .* number 2 is red there, yellow here: give --reset_head", str(outcomes[0]))
    assert outcomes[1:] == [None, None]

    # the same weights, raw: another number of the log
    raw = [f"--init_from={tmp_path / 'run/checkpoints/step_00000006'}", "--init_weights=raw"]
    assert run_ranks(1, finetune, [*evaluating(flags_of(labelled, tmp_path / "other")), *raw]) == [None]
    assert read_results(tmp_path / "other/evaluation.json")[-1]["loss"] == pytest.approx(rows[-1]["val_loss"], abs=1e-9)


def finetune_and_listen(flags: list[str]) -> tuple[str | None, str]:
    """What :func:`finetune` returns, and what it printed: a rank's output is not this process's."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return finetune(flags), said.getvalue()


def test_an_average_that_is_still_its_beginning_is_named_and_not_the_best(
    labelled: dict[str, Path], tmp_path: Path
) -> None:
    flags = [*flags_of(labelled, tmp_path / "run"), "--steps=8", "--evaluation.every=4", "--optimizer.ema_warmup=false"]
    ((error, said),) = run_ranks(1, finetune_and_listen, flags)
    assert error is None
    assert "(optimizer.ema_decay 0.9999) cannot follow a run of 8 steps: 100% of it will still be" in said
    row = read_metrics(tmp_path / "run")[-1]
    numbers = f"val_ema_top1 {row['val_ema_top1']:.2%}, val_top1 {row['val_top1']:.2%}"
    assert f"the weight average is still 100% the weights that the run began with: {numbers}" in said
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text())["metric"] == "val_top1"

    assert run_ranks(1, finetune, evaluating(flags)) == [None]
    alone = read_results(tmp_path / "run/evaluation.json")[-1]
    assert alone["top1"] == row["val_top1"]
    assert "raw weights of" in alone["origin"]
    assert "100% of which is still the weights that its run began with" in read_weights(tmp_path / "run").origin


def test_a_stopped_run_continues_bit_for_bit(labelled: dict[str, Path], tmp_path: Path) -> None:
    whole, stopped = flags_of(labelled, tmp_path / "whole"), flags_of(labelled, tmp_path / "stopped")
    assert run_ranks(1, finetune, whole) == [None]
    assert "after step 3;" in run_ranks(1, finetune_stopped, stopped, 3)[0]
    assert "after step 4;" in run_ranks(1, finetune_stopped, stopped, 1)[0]  # which was due for an evaluation
    assert "after step 6;" in run_ranks(1, finetune_stopped_evaluating, stopped, 3)[0]  # the last one
    assert run_ranks(1, finetune, stopped) == [None]
    rows: dict[int, dict[str, Any]] = {}
    for row in without_times(read_metrics(tmp_path / "stopped")):
        rows.setdefault(row["step"], {}).update(row)  # an evaluation that was made up has a row of its own
    assert list(rows.values()) == without_times(read_metrics(tmp_path / "whole"))
    best = "checkpoints/best.json"
    assert (tmp_path / "stopped" / best).read_text() == (tmp_path / "whole" / best).read_text()

    # what was evaluated is not evaluated again
    written = read_metrics(tmp_path / "stopped")
    assert run_ranks(1, finetune, stopped) == [None]
    assert read_metrics(tmp_path / "stopped") == written


def runs_without_an_average(flags: list[str], output_dir: Path) -> list[str | None]:
    """Train and evaluate such a run; start another from it, probe it, and classify by its raw weights' neighbours."""
    from examples.linear_probe import main

    other = f"--output_dir={output_dir / 'other'}"
    probe = [flag for flag in flags if not flag.startswith(("--augmentation", "--optimizer"))]
    probe += [f"--trunk={output_dir}", "--dtype=fp32", other]
    return [
        finetune(flags),
        finetune(evaluating(flags)),
        finetune([*flags, other, f"--init_from={output_dir}"]),
        call_script(main, probe),
        call_script(main, [*without_training(probe), "--trunk.weights=raw", "--knn=3"]),
    ]


def test_a_run_without_an_average(labelled: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*flags_of(labelled, run), "--steps=1", "--optimizer.ema_decay=0"]
    trained, evaluated, started, probed, neighbours = run_ranks(1, runs_without_an_average, flags, run)[0]
    assert trained is evaluated is neighbours is None
    row = read_metrics(run)[-1]
    assert not any(key.startswith("val_ema") for key in row)
    assert json.loads((run / "checkpoints/best.json").read_text())["metric"] == "val_top1"
    alone = read_results(run / "evaluation.json")[-1]
    assert "the raw weights of" in alone["origin"]
    assert alone["loss"] == pytest.approx(row["val_loss"], abs=1e-9)
    assert alone["top1"] == row["val_top1"]
    assert str(started).endswith("step_00000001 holds no weight average: take its raw weights with --init_weights raw.")
    assert str(probed).endswith("step_00000001 holds no weight average: take its raw weights with --trunk.weights raw.")


def test_bad_input_is_refused_in_one_sentence(trunk: Path, labelled: dict[str, Path], tmp_path: Path) -> None:
    flat = make_images(tmp_path / "flat", 3)
    fewer = make_labelled(tmp_path / "fewer", 2, ("blue", "red"))
    huge = with_labels(scan_folder(flat), _written(tmp_path / "labels.txt", "0\n1\n2147483646\n"))
    build_and_save_index(Known(huge), tmp_path / "huge", workers=1, progress=False)
    wider = [f"--init_from={trunk}", "--model.hidden_size=64"]
    cases: list[tuple[list[str], str]] = [
        ([f"--data={flat}"], "without a label"),
        (["--data=synthetic"], "no labels"),
        ([f"--data={tmp_path / 'huge'}"], "go up to 2,147,483,646, far beyond its 3 images: number the classes from 0"),
        ([f"--validation_data={fewer}"], r"3 classes .* 2: class green is missing"),
        (["--augmentation.mix_group=4", "--model.num_layers=4000"], "take --augmentation.mix_group 2"),  # at once
        (["--head.num_classes=2"], "label 2, but the classifier has 2 classes"),
        (wider, "hidden_size"),
        (["--evaluation.resize_size=16"], "smaller than the crop"),
        (["--evaluate_only", f"--init_from={trunk}"], r"not this model's head \(classifier"),
    ]
    flags = flags_of(labelled, tmp_path / "run")
    given = [evaluating(flags) if "--evaluate_only" in case else flags for case, _ in cases]
    outcomes = run_ranks(1, _all, [[*these, *case] for these, (case, _) in zip(given, cases, strict=True)])[0]
    for (_, message), outcome in zip(cases, outcomes, strict=True):
        assert outcome is not None
        assert outcome.startswith("ConfigError: ")
        assert re.search(message, outcome), outcome
        assert "\n" not in outcome
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_head_goes_on_with_its_own_classes_alone(labelled: dict[str, Path], tmp_path: Path) -> None:
    """Its outputs mean the classes that it was trained on, whichever folder --resume names."""
    other = make_labelled(tmp_path / "other", 8, ("blue", "green", "violet"))
    flags = [flag for flag in flags_of(labelled, tmp_path / "run") if not flag.startswith(("--steps", "--evaluation"))]
    flags = [flag for flag in flags if not flag.startswith("--validation_data")] + ["--steps=1"]
    more = [*flags, "--steps=2", f"--resume={tmp_path / 'run'}", f"--output_dir={tmp_path / 'more'}"]
    first, named, sized = run_ranks(1, _all, [flags, [*more, f"--data={other}"], [*more, "--head.num_classes=4"]])[0]
    assert first is None
    assert named is not None
    assert "number 2 is red there, violet here: label the images as those were, or start from it" in named
    assert sized is not None
    assert re.search(r"classifier\.\w+ has the shape \(3.*\), here \(4.*\): start from its weights", sized), sized
    assert not (tmp_path / "more").exists()


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _all(commands: list[list[str]]) -> list[str | None]:
    return [finetune(flags) for flags in commands]
