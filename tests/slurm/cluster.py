"""A real Slurm of two virtual nodes on this machine: installed, started, torn down; needs root on Debian or Ubuntu."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("nepa-node1", "nepa-node2")
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "  # virtual Slurm nodes of a test"


def install() -> None:
    """apt-get Slurm and munge where they are missing."""
    if all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        subprocess.run(["apt-get", "--quiet", *command], check=True, env=environment)


@contextlib.contextmanager
def virtual_cluster(folder: Path, cpus: int = 4, gpus: int = 2) -> Iterator[dict[str, str]]:
    """Run two nodes that believe to have ``cpus`` cores and ``gpus`` GPUs each, while the context lasts.

    Everything lies in ``folder``, but for two lines in /etc/hosts, which resolve the nodes' names and are removed.

    Yields:
        Environment for sbatch, srun and the like.
    """
    ports = _free_ports(1 + len(NODES))
    _write_config(folder, cpus, gpus, ports)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    hosts = HOSTS.read_text()
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        log = (folder / f"{Path(command[0]).name}{len(daemons)}.out").open("wb")
        options = {"env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        # a session of its own: Ctrl-C must reach the test only, which then tears this down in order
        daemons.append(subprocess.Popen(command, start_new_session=True, **options))  # type: ignore[call-overload]

    try:
        HOSTS.write_text(hosts.rstrip("\n") + "\n" + "".join(f"127.0.0.1 {name}{HOSTS_MARK}\n" for name in NODES))
        paths = {name: f"--{name}={folder}/munge.{suffix}" for name, suffix in _MUNGE_FILES.items()}
        start("munged", "--foreground", "--force", *paths.values())
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        start("slurmctld", "-D")
        for name in NODES:
            start("slurmd", "-D", "-N", name)
        _wait_for(lambda: _idle_nodes(environment) == len(NODES), "idle nodes", folder)
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["scancel", "--user=root", "--full"], env=environment, timeout=20, capture_output=True)
            time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        kept = [line for line in HOSTS.read_text().splitlines(keepends=True) if HOSTS_MARK not in line]
        HOSTS.write_text("".join(kept))


_MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "seed-file": "seed",
    "log-file": "log",
}


def _write_config(folder: Path, cpus: int, gpus: int, ports: list[int]) -> None:
    host = socket.gethostname()
    folder.chmod(0o755)  # pytest's are closed to others, which munge's socket must not be
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (folder / "state").mkdir()
    for name in NODES:
        (folder / "spool" / name).mkdir(parents=True)
    for i in range(gpus):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
    lines = [
        "ClusterName=virtual",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "CredType=cred/munge",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SlurmUser=root",
        "SlurmdUser=root",
        "ReturnToService=2",
        "MpiDefault=none",
        "SlurmdParameters=config_overrides",
        "GresTypes=gpu",
        "KillWait=30",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
    ]
    for name, port in zip(NODES, ports[1:], strict=True):
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=8000 "
            f"Gres=gpu:{gpus} State=UNKNOWN"
        )
    lines.append(f"PartitionName=debug Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _idle_nodes(environment: dict[str, str]) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
    return done.stdout.split().count("idle")


def _wait_for(ready: Callable[[], bool], what: str, folder: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = [f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log")]
            logs += [f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.out")]
            raise TimeoutError(f"no {what} within {seconds:.0f} s\n" + "\n".join(logs))
        time.sleep(0.2)
