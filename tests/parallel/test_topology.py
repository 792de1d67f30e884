"""A rank's place, where the machine does not fit what the launcher asked for."""

from __future__ import annotations

import pytest
import torch

from megatron_nepa.config import ConfigError
from megatron_nepa.parallel.topology import init_distributed


def test_a_rank_that_sees_too_few_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task shows each task one GPU alone, as number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", "MASTER_ADDR": "node"}
    for name, value in {**place, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"number 4 of its machine, but sees 1 GPU\(s\).*--gpus-per-node"):
        init_distributed()
