"""How a script's process ends: its exit status, and signals before there is anything to save."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from megatron_nepa.training.stopping.signals import SIGNALS

REACH = "let this user reach it, or give another path"
BODY = """
import sys, time, threading
from megatron_nepa.config import ConfigError, RankConfigError
from megatron_nepa.training.stopping.process import exit_on_user_error
from megatron_nepa.training.stopping.errors import RunStopped, TrainingError
with exit_on_user_error():
    print("started", flush=True)
    {line}
"""


def hear_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup


def start(line: str, before: Callable[[], object] = hear_hangups) -> subprocess.Popen[str]:
    """A script of this line; ``before`` is called in its process before Python starts."""
    command = [sys.executable, "-c", BODY.format(line=line)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before)


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("pass", 0, ""),
        ("raise ConfigError('give another folder.')", 2, "error: give another folder.\n"),
        ("raise RankConfigError('a.jpg is bad.')", 2, "error: a.jpg is bad.\n"),
        ("raise TrainingError('it diverged.')", 3, "error: it diverged.\n"),
        ("raise RunStopped('by a signal')", 75, ""),
        ("open('x' * 300)", 2, f"error: {'x' * 300}: file name too long; give a shorter path.\n"),
        ("raise PermissionError(13, 'Permission denied', '/a')", 2, f"error: /a: permission denied; {REACH}.\n"),
    ],
    ids=["finished", "bad input", "bad input of one rank", "failed", "stopped", "long name", "closed folder"],
)
def test_status(line: str, status: int, message: str) -> None:
    process = start(line)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (status, message)


def test_an_unforeseen_error_tells_its_rank_and_cause() -> None:
    process = start("{}['key']")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.startswith("rank 0 failed:\nTraceback")
    assert error.strip().endswith("KeyError: 'key'")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_ends_even_a_process_that_waits_in_native_code(number: signal.Signals) -> None:
    # a lock of the C library, as a collective's: Python's own handlers run only when it returns
    process = start("import ctypes; ctypes.PyDLL(None); ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    process.send_signal(number)
    sent = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - sent < 5
    assert error.strip() == f"{number.name} outside of training: nothing to save, exits."


def test_nohup_is_left_to_ignore_the_lost_terminal() -> None:
    process = start("import time; time.sleep(1)", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
