"""A folder that cannot be a run's is one sentence, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_nepa.config import ConfigError, PretrainingConfig
from megatron_nepa.parallel.topology import build_topology
from megatron_nepa.training.reporting.run_record import RunRecord
from tests.distributed.ranks import run_ranks

PLACES = {
    "a" * 300: "File name too long",
    "loop": "Symlink loop",
    "loop/below": "Symlink loop",
    "file": "is a file; give a folder",
    "file/below": "is a file; give a folder",
}


def refusals(folder: Path) -> list[str]:
    topology = build_topology(torch.device("cpu"), 1)
    said = []
    for name in PLACES:
        run = PretrainingConfig(output_dir=str(folder / name), steps=1)
        with pytest.raises(ConfigError) as refused:
            RunRecord(run).checkpoint_to_resume(topology, None)
        said.append(str(refused.value))
    return said


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for said, reason in zip(run_ranks(1, refusals, tmp_path)[0], PLACES.values(), strict=True):
        assert reason in said
        assert said.startswith("--output_dir ")
