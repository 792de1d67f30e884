"""Training runs of the script, a process a rank, and the losses that they log."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_nepa.acceptance.check import MISSING

ROOT = Path(__file__).parents[2]
# attention's backward and the sums of gradients repeat bit for bit only if torch is asked to
DETERMINISTIC = "import torch; torch.use_deterministic_algorithms(True)"
START = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def train(
    output: Path, flags: Sequence[str], ranks: int = 1, before: str = "", ds_config: str = "zero2"
) -> list[float]:
    """Run ``pretrain_nepa.py`` to its end.

    Args:
        output: its folder.
        flags: of the script.
        ranks: processes, of one machine.
        before: Python that each runs first.
        ds_config: name of a file in ``ds_configs``.

    Returns:
        The loss of every step that the folder's log holds.

    Raises:
        ModuleNotFoundError: a package that the script needs is not installed.
        RuntimeError: with the last line of a rank that failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    script = [str(ROOT / "pretrain_nepa.py"), *flags, f"--output_dir={output}"]
    command = [
        sys.executable,
        "-c",
        f"{before}\n{START}",
        *script,
        f"--ds_config={ROOT / 'ds_configs' / ds_config}.json",
    ]
    logs = [output / f"rank{rank}.log" for rank in range(ranks)]
    surroundings = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    surroundings |= {"MASTER_PORT": str(_free_port()), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "WANDB_MODE": "disabled"}
    surroundings["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # a job's own variables speak of other ranks
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | surroundings
    processes = []
    for rank, log in enumerate(logs):
        place = surroundings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=place))
    statuses = [process.wait() for process in processes]
    for status, log in zip(statuses, logs, strict=True):
        if status:
            text = log.read_text(errors="replace")
            if missing := MISSING.search(text):
                raise ModuleNotFoundError(missing[0], name=missing[1] or missing[2])
            raise RuntimeError(f"{(text.strip().splitlines() or ['status ' + str(status)])[-1]} (see {log})")
    return losses(output)


def losses(output: Path) -> list[float]:
    """Of every step in the folder's log, NaN where it was not finite; none where there is no log."""
    log = output / "metrics.jsonl"
    if not log.is_file():
        return []
    found = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
    return [float("nan") if loss is None else loss for loss in found]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
