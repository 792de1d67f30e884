"""A run whose images come from a server that goes away: a sentence, a checkpoint, and on from there."""

from __future__ import annotations

import urllib.request
from functools import partial
from pathlib import Path

import pytest

from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from tests.data.range_server import serving
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain, read_metrics

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
