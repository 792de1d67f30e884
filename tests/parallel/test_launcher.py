"""Launchers as people use them: whole, partial and contradicting variables, and ranks that do not meet."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys

import pytest

from megatron_nepa.config import ConfigError
from megatron_nepa.parallel.launcher import (
    Place,
    find_place,
    forming_groups,
    meet,
    ranks_of_this_node,
    require_own_gpu,
    require_rendezvous,
)

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
STEP |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}
# the shell of salloc, in a job of eight tasks
SHELL = {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "place", "of_this_node"),
    [
        ({}, Place(), 1),
        ({"RANK": "0"}, Place(), 1),
        ({"WORLD_SIZE": "1", "MASTER_PORT": ""}, Place(), 1),
        ({"LOCAL_RANK": "2"}, Place(), 1),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Place(5, 8, 1), 4),
        (SHELL, Place(), 1),
        (STEP, Place(3, 4, 1), 2),
        ({**STEP, "WORLD_SIZE": "4"}, Place(3, 4, 1), 2),
        ({**STEP, "RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, 1), 2),
    ],
)
def test_place(variables: dict[str, str], place: Place, of_this_node: int) -> None:
    assert (find_place(variables), ranks_of_this_node(variables)) == (place, of_this_node)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set and no launcher is at work"),
        ({**STEP, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set and srun's step has 4 tasks"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1 and WORLD_SIZE 2, but LOCAL_RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'; it must be a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'; it must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but WORLD_SIZE is 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun started 2 processes, but RANK is not set"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "mpirun started 4 processes, but RANK is not set"),
    ],
)
def test_contradictions_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_place(variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "node1", "MASTER_PORT": ""}, "without MASTER_PORT: "),
        ({}, "without MASTER_ADDR and MASTER_PORT: "),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"MASTER_ADDR": "no.such.machine.invalid", "MASTER_PORT": "29500"}, "names no machine from here"),
        ({"MASTER_ADDR": "a" * 300, "MASTER_PORT": "29500"}, "names no machine from here"),
    ],
)
def test_a_rendezvous_that_is_none(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_rendezvous(variables, 2)


def in_a_network_that_is_down(code: str) -> str:
    """What Python prints in a network namespace of its own, whose loopback nobody has brought up."""
    outside = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*outside, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    return subprocess.run([*outside, sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_a_network_that_is_down() -> None:
    meeting = """
from megatron_nepa.parallel.launcher import require_rendezvous
require_rendezvous({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 2)
"""
    assert "MASTER_ADDR is 127.0.0.1, and no network leads there" in in_a_network_that_is_down(meeting)


def test_groups_that_cannot_be_formed() -> None:
    gloo = "[enforce fail at /a/b/device.cc:215] ifa != nullptr. Unable to find interface for: [127.0.0.1]"
    for text, said in ((gloo, r"group \(ifa != nullptr\. Unable to find interface"), ("", r"group \(RuntimeError\)")):
        with pytest.raises(ConfigError, match=said), forming_groups():
            raise RuntimeError(text)


def test_a_rank_that_sees_no_gpu_of_its_own() -> None:
    require_own_gpu(Place(1, 2, 1), 2)
    with pytest.raises(ConfigError, match=r"rank 5 is number 2 of its machine, but sees 1 GPU.*--gpus-per-task"):
        require_own_gpu(Place(5, 8, 1), 1)


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        taken.listen()
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}, a port that another program uses: .*--master_port"):
            meet(Place(0, 2, 0), "127.0.0.1", port, seconds=1)
    with pytest.raises(ConfigError, match=rf"only 1 of 3 ranks came to 127.0.0.1:{port} within 1 s"):
        meet(Place(0, 3, 0), "127.0.0.1", port, seconds=1)
    with pytest.raises(ConfigError, match=rf"rank 1 of 3 found no first rank at 127.0.0.1:{port} within 1 s"):
        meet(Place(1, 3, 1), "127.0.0.1", port, seconds=1)
