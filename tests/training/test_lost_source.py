"""A run whose images come from a server that goes away: a sentence, a checkpoint, and on from there."""

from __future__ import annotations

import urllib.request
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from tests.data.range_server import serving
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain, read_metrics, without_training
from tests.tasks.labelled import TINY as LABELLED
from tests.tasks.labelled import finetune, make_labelled
from tests.training.test_run_record import remove_in_step

pytest.importorskip("aiohttp")
STEPS = 14


def lose_source_at(url: str, step: int) -> None:
    """Rank 1 tells the server to die in the middle of a step; few images are read ahead of it."""
    import os

    from megatron_nepa.data.decoding import sample_reader
    from megatron_nepa.tasks.pretraining import PretrainingTask

    sample_reader._REMOTE_AHEAD = 4
    real, calls = PretrainingTask.forward, [0]

    def forward(self: PretrainingTask, engine: object, batch: object) -> object:
        calls[0] += 1
        if calls[0] == step and os.environ["RANK"] == "1":
            urllib.request.urlopen(f"{url}/die").close()
        return real(self, engine, batch)  # type: ignore[arg-type]

    PretrainingTask.forward = forward  # type: ignore[method-assign, assignment]


def test_a_dead_server_ends_the_run_with_a_checkpoint_that_it_continues_from(tmp_path: Path) -> None:
    """Two ranks; the losses are those of a run over the same shards here, which never stopped."""
    write_shards(scan_folder(make_images(tmp_path / "images")), tmp_path / "shards", 7, progress=False)
    local, remote = tmp_path / "local.index", tmp_path / "remote.index"
    build_and_save_index(open_source(tmp_path / "shards"), local, workers=1, progress=False)
    flags = [*TINY, f"--steps={STEPS}", "--save_every=100", "--log_every=10", "--data.remote_patience=1"]
    assert run_ranks(2, pretrain, [*flags, f"--data={local}", f"--output_dir={tmp_path}/whole"]) == [None, None]
    with serving(tmp_path / "shards") as server:
        build_and_save_index(open_source(server.url), remote, workers=1, progress=False)
        command = [*flags, f"--data={remote}", f"--output_dir={tmp_path}/run"]
        errors = run_ranks(2, pretrain, command, partial(lose_source_at, server.url, 3))
        assert errors[0] == errors[1]
        assert errors[0].startswith("TrainingError: rank ")
        assert f"{server.url}/shard_" in errors[0]
        assert " has given no bytes for 1 s (" in errors[0]
        (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
        step = int(saved.name.removeprefix("step_"))
        assert 3 <= step < STEPS
        end = f"Saved {saved}; the same command continues from step {step} once it can be read again."
        assert errors[0].endswith(end)
        assert "\n" not in errors[0]
        assert not (tmp_path / "run/bad_images.jsonl").exists()
        server.faults.dead = False
        assert run_ranks(2, pretrain, command) == [None, None]
    whole, run = (read_metrics(tmp_path / name) for name in ("whole", "run"))
    assert [row["loss"] for row in run] == [row["loss"] for row in whole]
    assert [row["grad_norm"] for row in run] == [row["grad_norm"] for row in whole]


def lose_source_in_evaluation(url: str, number: int) -> None:
    """Rank 1 tells the server to die at the beginning of an evaluation, counted from 1, whose last rank it is."""
    import os

    from megatron_nepa.tasks.classification import ClassificationEvaluator

    real, calls = ClassificationEvaluator.evaluate, [0]

    def evaluate(self: ClassificationEvaluator, model: object, interrupted: object) -> object:
        calls[0] += 1
        if calls[0] == number and os.environ["RANK"] == "1":
            urllib.request.urlopen(f"{url}/die").close()
        dist.barrier()
        return real(self, model, interrupted)  # type: ignore[arg-type]

    ClassificationEvaluator.evaluate = evaluate  # type: ignore[method-assign, assignment]


def finetune_with_fault(arguments: list[str], fault: partial[None]) -> str | None:
    fault()
    return finetune(arguments)


def test_a_dead_server_of_the_evaluation_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """Every rank learns of it, what was trained is saved, and the evaluation is made up when the run continues."""
    train = make_labelled(tmp_path / "train", per_class=8)
    write_shards(scan_folder(make_labelled(tmp_path / "val", per_class=3)), tmp_path / "shards", 4, progress=False)
    flags = [*LABELLED, f"--data={train}", "--steps=3", "--evaluation.every=2", "--data.remote_patience=1"]
    flags += [f"--output_dir={tmp_path}/run", f"--validation_data={tmp_path}/val.index"]
    with serving(tmp_path / "shards") as server:
        build_and_save_index(open_source(server.url), tmp_path / "val.index", workers=1, progress=False)
        fault = partial(lose_source_in_evaluation, server.url, 1)
        errors = run_ranks(2, finetune_with_fault, flags, fault)
        assert errors[0] == errors[1]
        assert errors[0].startswith("TrainingError: rank ")
        assert " has given no bytes for 1 s (" in errors[0]
        end = f"Saved {tmp_path}/run/checkpoints/step_00000002; the same command continues from step 2 once it can be"
        assert end in errors[0]
        server.faults.dead = False
        evaluation = [flag for flag in without_training(flags) if not flag.startswith("--data=")] + ["--evaluate_only"]
        errors = run_ranks(2, finetune_with_fault, evaluation, partial(lose_source_in_evaluation, server.url, 1))
        assert errors[0] == errors[1]
        assert " has given no bytes for 1 s (" in errors[0]
        server.faults.dead = False
        assert run_ranks(2, finetune, flags) == [None, None]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "val_top1" in row] == [2, 3]


def remove_and_lose(url: str, output: Path, step: int) -> None:
    """The run's folder is removed as well, in the step before the images are missed."""
    lose_source_at(url, step)
    remove_in_step(step, output, claim=False)


def test_a_removed_folder_is_made_anew_for_the_checkpoint_of_a_lost_source(tmp_path: Path) -> None:
    write_shards(scan_folder(make_images(tmp_path / "images")), tmp_path / "shards", 7, progress=False)
    flags = [*TINY, "--steps=14", "--data.remote_patience=1", f"--output_dir={tmp_path}/run"]
    with serving(tmp_path / "shards") as server:
        build_and_save_index(open_source(server.url), tmp_path / "remote.index", workers=1, progress=False)
        fault = partial(remove_and_lose, server.url, tmp_path / "run", 3)
        errors = run_ranks(2, pretrain, [*flags, f"--data={tmp_path}/remote.index"], fault)
    assert errors[0] == errors[1]
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert f"Saved {saved}; the same command continues" in errors[0]
    assert (tmp_path / "run/config.json").is_file()
