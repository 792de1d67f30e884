"""Files of results: one entry for each choice of settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_nepa.config import ConfigError
from megatron_nepa.parallel.topology import build_topology
from megatron_nepa.training.results import read_results, require_results, write_results
from tests.distributed.ranks import run_ranks


def test_other_settings_stand_beside_and_the_same_settings_replace(tmp_path: Path) -> None:
    path = tmp_path / "new" / "neighbours.json"
    for k, accuracy in ((5, 0.1), (20, 0.2), (5, 0.3)):
        write_results(path, "average of x", {"k": k, "weights": "ema", "block": None}, {"knn_top1": accuracy})
    assert read_results(path) == [
        {"settings": {"k": k, "weights": "ema", "block": None}, "origin": "average of x", "knn_top1": accuracy}
        for k, accuracy in ((20, 0.2), (5, 0.3))
    ]


def test_a_single_result_of_an_older_version_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    old = {"weights": "average of x", "top1": 0.5}
    path.write_text(json.dumps(old))
    write_results(path, "raw weights of x", {"weights": "raw"}, {"top1": 0.4})
    assert read_results(path) == [old, {"settings": {"weights": "raw"}, "origin": "raw weights of x", "top1": 0.4}]


@pytest.mark.parametrize("text", ["", "3", "[3]"])
def test_another_file_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"evaluation.json holds no results of an evaluation: move it away"):
        write_results(path, "raw weights of x", {}, {"top1": 0.4})
    assert path.read_text() == text


def refusals(folder: Path) -> list[str]:
    topology, said = build_topology(torch.device("cpu"), 1), []
    for place in ("/dev/full", "/proc/none", str(folder / "file/below"), str(folder)):
        with pytest.raises(ConfigError) as refused:
            require_results(Path(place) / "evaluation.json", topology)
        said.append(str(refused.value))
    require_results(folder / "new/evaluation.json", topology)
    return said


def test_what_cannot_be_written_is_refused_before_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "evaluation.json").write_text("[3]")
    full, proc, file, other = run_ranks(1, refusals, tmp_path)[0]
    assert full == "--output_dir /dev/full: /dev/full is a file; give a folder."
    assert proc.startswith("/proc/none/evaluation.json cannot be written (rank 0: [Errno 2] No such file")
    assert file == f"--output_dir {tmp_path}/file/below: {tmp_path}/file is a file; give a folder."
    assert "holds no results of an evaluation: move it away" in other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "file"]
