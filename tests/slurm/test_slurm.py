"""The shipped sbatch file on a real Slurm: preempted by its signal, requeued, continued, with the same losses."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nepa.training.reporting.metrics_file import read_metrics
from tests.runs import TINY, make_images
from tests.slurm.cluster import NODES, install, virtual_cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
STEPS = 150
# two nodes of two ranks on a CPU, in place of one node of eight GPUs
RESOURCES = "--nodes=2 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --mem=100"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[dict[str, str]]:
    if "slurm" not in pytestconfig.option.markexpr:
        pytest.skip("installs and starts Slurm: ask for it with -m slurm")
    if os.geteuid() != 0:
        pytest.skip("starts Slurm's daemons: needs root")
    install()
    with virtual_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**environment, "VENV": str(Path(sys.executable).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def call(slurm: dict[str, str], command: str) -> str:
    done = subprocess.run(shlex.split(command), env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def submit(slurm: dict[str, str], images: Path, output: Path, resources: str = "") -> str:
    """Queue the sbatch file for pre-training B with a tiny model; returns the job's number."""
    flags = [*TINY, "--global_batch_size=64", "--micro_batch_size=2", f"--steps={STEPS}", "--log_every=1"]
    flags += ["--recipe=quickstart", f"--data={images}", f"--output_dir={output}"]
    command = f"sbatch --parsable {RESOURCES} {resources} --output={output}.log examples/slurm/pretrain_b.sbatch"
    return call(slurm, f"{command} {shlex.join(flags)}")


def state(slurm: dict[str, str], job: str) -> dict[str, str]:
    """What Slurm knows of a job, such as {"JobState": "RUNNING", "Restarts": "0"}."""
    return dict(
        part.split("=", 1) for part in call(slurm, f"scontrol --oneliner show job {job}").split() if "=" in part
    )


def wait_for_end(slurm: dict[str, str], job: str, output: Path, seconds: float = 400.0) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while (found := state(slurm, job))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
        assert time.monotonic() < deadline, f"{found}\n{log_of(output)}"
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            # Slurm holds a requeued job back for two minutes
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, capture_output=True)
        time.sleep(1)
    return found


def log_of(output: Path) -> str:
    path = output.with_name(f"{output.name}.log")
    return path.read_text() if path.exists() else ""


def losses(output: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(output / "metrics.jsonl")]


def wait_for_steps(slurm: dict[str, str], job: str, output: Path, count: int, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < count:
        assert time.monotonic() < deadline, log_of(output)
        assert state(slurm, job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log_of(output)
        time.sleep(0.5)


def test_a_preempted_job_requeues_and_finishes_as_if_undisturbed(
    slurm: dict[str, str], images: Path, tmp_path: Path
) -> None:
    """Slurm itself sends the signal: the job's time limit is cut, so that its --signal is due while it trains."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = submit(slurm, images, whole, "--time=60")
    found = wait_for_end(slurm, job, whole)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "0"), log_of(whole)
    assert len(losses(whole)) == STEPS

    job = submit(slurm, images, cut, "--time=60")
    wait_for_steps(slurm, job, cut, 3)
    # less than the 300 seconds of the sbatch file's --signal: it is due at once
    call(slurm, f"scontrol update JobId={job} TimeLimit=4")
    deadline = time.monotonic() + 120
    while "goes back into the queue" not in log_of(cut):
        assert time.monotonic() < deadline, log_of(cut)
        time.sleep(0.5)
    steps_before = len(losses(cut))
    assert 3 <= steps_before < STEPS
    assert f"stopped by SIGUSR1 after step {steps_before};" in log_of(cut)
    call(slurm, f"scontrol update JobId={job} TimeLimit=60")
    found = wait_for_end(slurm, job, cut)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1"), log_of(cut)
    assert f"continuing {cut}/checkpoints/step_{steps_before:08d} at step {steps_before}" in log_of(cut)
    assert losses(cut) == losses(whole)


def test_bad_input_ends_the_job_and_is_not_requeued(slurm: dict[str, str], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = submit(slurm, images / "absent", output, "--time=60")
    found = wait_for_end(slurm, job, output)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), log_of(output)
    assert "error: " in log_of(output)
    assert "absent" in log_of(output)


def test_a_killed_rank_ends_the_job_within_seconds(slurm: dict[str, str], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = submit(slurm, images, output, "--time=60")
    wait_for_steps(slurm, job, output, 2)
    # columns PID, JOBID, STEPID, LOCALID, GLOBALID; a dash for what a task started
    lines = call(slurm, f"scontrol listpids {job}.0 {NODES[1]}").splitlines()
    (pid,) = [int(line.split()[0]) for line in lines if line.split()[-1] == "3"]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    found = wait_for_end(slurm, job, output)
    assert time.monotonic() - killed < 20
    assert found["JobState"] == "FAILED"
    assert found["Restarts"] == "0"
    assert log_of(output).count("error: lost rank 3: its process ended") == 1, log_of(output)
