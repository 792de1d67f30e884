"""Stopping on a signal, in one process and agreed between two."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from megatron_nepa.training.stopping import preemption
from megatron_nepa.training.stopping.preemption import StopSignal, job_end_time
from megatron_nepa.training.stopping.signals import SIGNALS


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_sets_a_flag_and_says_so(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    with StopSignal() as stop:
        assert stop.agreed(None, 1) is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # the launcher's echo of the same stop
        assert stop.agreed(None, 1) == number.name
    signal.signal(signal.SIGHUP, former)
    assert capfd.readouterr().err.strip().splitlines() == [
        f"{number.name}: stopping after this step; the same signal more than 3 s later exits at once."
    ]


def test_silent_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal(announce=False) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.agreed(None, 1) == "SIGUSR1"
    assert capfd.readouterr().err == ""


def test_former_handlers_return() -> None:
    received: list[int] = []

    def stop_and_fail() -> None:
        with StopSignal(announce=False):
            signal.raise_signal(signal.SIGUSR1)
            raise RuntimeError("inside")

    on_interrupt = signal.getsignal(signal.SIGINT)
    former = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with pytest.raises(RuntimeError, match="inside"):
            stop_and_fail()
        assert received == []
        signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGINT) is on_interrupt
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_the_same_signal_again_exits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exited(Exception):
        pass

    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(preemption, "REPEAT_SECONDS", 0.05)
    with StopSignal(announce=False):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.06)
        signal.raise_signal(signal.SIGUSR1)  # another one lets the save finish
        with pytest.raises(Exited, match="143"):
            signal.raise_signal(signal.SIGTERM)


def _rank(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with StopSignal(announce=False) as stop:
        before = stop.agreed(dist.group.WORLD, 2)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        after = stop.agreed(dist.group.WORLD, 2)
    (Path(folder) / str(rank)).write_text(f"{before} {after}")
    dist.destroy_process_group()


def test_all_ranks_agree(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["None SIGUSR1"] * 2


def test_the_end_of_the_jobs_time_stops_early_enough_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    with StopSignal(announce=False, end_time=now + 100.0) as stop:
        assert stop.agreed(None, 1) is None
        stop.save_seconds = 20.0  # 100 s are left: 60 to leave, and twice 20
        assert stop.agreed(None, 1) == "the end of the job's time"
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(None, 1) == "SIGTERM"


@pytest.mark.parametrize(("text", "seconds"), [("1800000000", 1.8e9), ("", None), ("N/A", None), (None, None)], ids=str)
def test_slurm_tells_the_end(text: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if text is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    assert job_end_time() == seconds
