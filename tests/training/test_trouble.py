"""A run in trouble says which rank, where and why: losses that are not finite, stalled ranks, lost ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.distributed.ranks import exit_statuses, run_ranks
from tests.runs import TINY, make_images, pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def poison_rank(rank: int, step: int) -> None:
    """Make one rank's images non-finite in one step."""
    import torch

    from megatron_nepa.tasks.pretraining import PretrainingTask

    real, calls = PretrainingTask.forward, [0]

    def poisoned(self: PretrainingTask, engine: object, batch: object) -> object:
        calls[0] += 1
        if calls[0] == step and int(os.environ["RANK"]) == rank:
            batch.images.fill_(torch.nan)  # type: ignore[attr-defined]
        return real(self, engine, batch)  # type: ignore[arg-type]

    PretrainingTask.forward = poisoned  # type: ignore[method-assign, assignment]


def pretrain_and_listen(arguments: list[str], fault: partial[None] | None = None) -> tuple[str | None, str]:
    """:func:`tests.runs.pretrain`, and what this rank printed."""
    log = Path(os.environ["LISTEN"] if "LISTEN" in os.environ else arguments[-1].removeprefix("--output_dir="))
    path = log.with_name(f"{log.name}.rank{os.environ['RANK']}.txt")
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    error = pretrain(arguments, fault)
    sys.stdout.flush()
    sys.stderr.flush()
    return error, path.read_text()


def test_a_loss_that_is_not_finite_names_rank_step_and_samples(images: Path, tmp_path: Path) -> None:
    """Rank 1 of 2 takes samples 20 to 23 in step 3; the log is read every 10 steps, a skipped step is told at once."""
    arguments = [*TINY, f"--data={images}", "--steps=4", f"--output_dir={tmp_path}/run"]
    (_, printed), (_, other) = run_ranks(2, pretrain_and_listen, arguments, partial(poison_rank, 1, 3))
    lines = printed.splitlines()
    place = lines.index("warning: step 3: the loss was not finite on rank 1 (samples 20 to 23).")
    assert any(line.startswith("step 3/4") for line in lines[:place])
    assert any(line.startswith("step 4/4 | loss -") for line in lines[place:])
    assert "not finite" not in other


def stall_rank(rank: int, step: int, seconds: float) -> None:
    """Make one rank's data stop coming for a while."""
    from megatron_nepa.data.loaders.pretraining import PretrainingLoader as Loader

    real, calls = Loader.__next__, [0]

    def a_disk_that_hangs(self: Loader) -> object:
        calls[0] += 1
        if calls[0] == step and int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return real(self)

    Loader.__next__ = a_disk_that_hangs  # type: ignore[method-assign, assignment]


def test_a_stalled_rank_is_named_with_its_stack(images: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"--data={images}", "--steps=3", "--global_batch_size=12", "--stall_timeout=3"]
    arguments += [f"--output_dir={tmp_path}/run"]
    outcomes = run_ranks(3, pretrain_and_listen, arguments, partial(stall_rank, 1, 2, 9.0))
    assert [error for error, _ in outcomes] == [None] * 3  # it went on when the data came
    printed = "".join(text for _, text in outcomes)
    assert printed.count("stalled:") == 1, printed
    assert "stalled: rank 1 is furthest behind: waiting for data of step 2 for " in printed
    assert "in a_disk_that_hangs" in printed


def frozen_rank(rank: int, step: int) -> None:
    """Make one rank stop as a whole in one step, as a debugger or a sick node does, and wake it after 14 seconds."""
    from megatron_nepa.training.engine.engine import TrainingEngine

    real, calls = TrainingEngine.step, [0]

    def freezing(self: TrainingEngine, learning_rate: float) -> object:
        calls[0] += 1
        if calls[0] == step and int(os.environ["RANK"]) == rank:
            subprocess.Popen(["sh", "-c", f"sleep 14; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, learning_rate)

    TrainingEngine.step = freezing  # type: ignore[method-assign, assignment]


def test_a_rank_that_does_not_answer_is_named(images: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"--data={images}", "--steps=3", "--stall_timeout=3", f"--output_dir={tmp_path}/run"]
    (_, printed), _ = run_ranks(2, pretrain_and_listen, arguments, partial(frozen_rank, 1, 2))
    assert "stalled: rank 1 is not answering: stopped, or stuck in native code" in printed


def start(world_size: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """The script on ranks of its own, without a launcher that would end the others."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, "-u", str(ROOT / "pretrain_nepa.py"), *arguments]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return ranks


def wait_for_step(output: Path, step: int, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    path = output / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_others_within_seconds(victim: int, images: Path, tmp_path: Path) -> None:
    """SIGKILL, as by the kernel when memory runs out: the others end with status 3, and one says who was lost."""
    arguments = [*TINY, f"--data={images}", "--steps=100000", "--log_every=1", "--global_batch_size=12"]
    ranks = start(3, [*arguments, f"--output_dir={tmp_path}/run"])
    try:
        wait_for_step(tmp_path / "run", 2)
        ranks[victim].kill()
        killed = time.monotonic()
        outputs = [process.communicate(timeout=60)[0] for process in ranks]
        assert time.monotonic() - killed < 10
    finally:
        for process in ranks:
            process.kill()
    survivors = [rank for rank in range(3) if rank != victim]
    assert [ranks[rank].returncode for rank in survivors] == [3, 3], outputs
    told = [line for rank in survivors for line in outputs[rank].splitlines() if "lost rank" in line]
    assert len(told) == 1, outputs
    assert told[0].startswith(f"error: lost rank {victim}: its process ended")
    assert "Traceback" not in "".join(outputs)


def a_bad_image_and_deaf_peers(arguments: list[str], log: Path) -> None:
    """Rank 1's images cannot be read in step 2; the others wait in native code that no signal ends, as in NCCL."""
    import ctypes

    from megatron_nepa.config import ConfigError
    from megatron_nepa.data.loaders.pretraining import PretrainingLoader as Loader
    from megatron_nepa.training.engine.engine import TrainingEngine
    from megatron_nepa.training.stopping.process import exit_on_user_error
    from pretrain_nepa import main

    rank = int(os.environ["RANK"])
    real_next, real_step, calls = Loader.__next__, TrainingEngine.step, [0, 0]

    def reading(self: Loader) -> object:
        calls[0] += 1
        if calls[0] == 2 and rank == 1:
            (log / "failed").touch()
            raise ConfigError("every image of the batch is bad.")
        return real_next(self)

    def waiting(self: TrainingEngine, learning_rate: float) -> object:
        calls[1] += 1
        if calls[1] == 2:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.CDLL(None).sleep(100)
        return real_step(self, learning_rate)

    Loader.__next__ = reading  # type: ignore[method-assign, assignment]
    TrainingEngine.step = waiting  # type: ignore[method-assign, assignment]
    with (log / f"rank{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    with exit_on_user_error():
        main(arguments)


def test_a_bad_image_on_one_rank_ends_the_others_within_seconds(images: Path, tmp_path: Path) -> None:
    """The peers' main threads never come back from native code: their watches end them."""
    arguments = [*TINY, f"--data={images}", "--steps=9", "--global_batch_size=12", f"--output_dir={tmp_path}/run"]
    statuses = exit_statuses(3, a_bad_image_and_deaf_peers, arguments, tmp_path)
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 20
    assert statuses == [3, 3, 3]
    told = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(3)]
    assert "error: rank 1: every image of the batch is bad." in told[1]
    assert "lost rank 1" in told[0]
    assert "Traceback" not in "".join(told)
