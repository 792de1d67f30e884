"""The folder of a run: what cannot be one, and one that is removed while the run goes on."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nepa.config import ConfigError, DataConfig, PretrainingConfig
from megatron_nepa.parallel.topology import build_topology
from megatron_nepa.training.reporting.run_record import RunRecord
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain, read_metrics

PLACES = {
    "a" * 300: "File name too long",
    "loop": "Symlink loop",
    "loop/below": "Symlink loop",
    "file": "is a file; give a folder",
    "file/below": "is a file; give a folder",
    "gone": "gone is a link that leads nowhere; give a folder",
    "gone/below": "gone is a link that leads nowhere; give a folder",
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
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    for said, reason in zip(run_ranks(1, refusals, tmp_path)[0], PLACES.values(), strict=True):
        assert reason in said
        assert said.startswith("--output_dir ")


OUTPUTS = {  # where the images are "d", and what is a folder of a run there
    ("d", "d"): False,
    ("d", "d/runs/one"): False,
    ("d", "e"): True,
    ("d", "d/.runs/one"): True,  # hidden entries are no images
    ("e=0.5,d=0.5", "d/runs"): False,
    ("pairs", "pairs/runs"): True,  # images/ and annotations/ alone are walked
}


def apart_from_data(folder: Path) -> list[str | None]:
    topology, said = build_topology(torch.device("cpu"), 1), list[str | None]()
    os.chdir(folder)  # of this forked rank
    for data, output in OUTPUTS:
        run = PretrainingConfig(output_dir=str(folder / output), steps=1, data=DataConfig(path=data))
        try:
            RunRecord(run).checkpoint_to_resume(topology, None)
            said.append(None)
        except ConfigError as error:
            said.append(str(error))
    return said


def test_a_run_does_not_write_its_pictures_among_its_images(tmp_path: Path) -> None:
    for name in ("d", "e", "pairs/images", "pairs/annotations"):
        (tmp_path / name).mkdir(parents=True)
    for said, allowed in zip(run_ranks(1, apart_from_data, tmp_path)[0], OUTPUTS.values(), strict=True):
        assert (said is None) == allowed
        assert said is None or "lies among the images of d, which its pictures would join" in said


def without_room(arguments: list[str]) -> str | None:
    shutil.disk_usage = lambda _: (10**9, 10**9 - 1000, 1000)  # type: ignore[assignment, return-value]
    return pretrain(arguments)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(tmp_path: Path) -> None:
    arguments = [
        *TINY,
        f"--data={make_images(tmp_path / 'images', 8)}",
        f"--output_dir={tmp_path / 'run'}",
        "--steps=2",
    ]
    first, second = run_ranks(2, without_room, arguments)
    assert first == second
    assert first is not None
    assert re.search(
        r"ConfigError: a checkpoint of this run takes 0\.\d MB, and the disk of .*run has 0\.0 MB left", first
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()


def remove_in_step(step: int, folder: Path, claim: bool) -> None:
    """Remove a run's folder in the middle of a step, and make another run's in its place or not."""
    from megatron_nepa.training.engine.engine import TrainingEngine

    real, calls = TrainingEngine.step, [0]

    def removing(self: TrainingEngine, learning_rate: Any) -> Any:
        calls[0] += 1
        if calls[0] == step and self.topology.is_main:
            shutil.rmtree(folder)
            if claim:
                folder.mkdir()
                (folder / "config.json").write_text("{}")
        return real(self, learning_rate)

    TrainingEngine.step = removing  # type: ignore[method-assign]


def a_removed_folder(images: Path, output: Path, claim: bool) -> tuple[str | None, str | None, str]:
    """What ends a run whose folder is removed, what ends another in the same folder, and what both print."""
    arguments = [*TINY, f"--data={images}", f"--output_dir={output}", "--steps=4", "--save_every=2"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        first = pretrain(arguments, partial(remove_in_step, 3, output, claim))
        second = pretrain([*arguments, "--seed=5"])
    return first, second, printed.getvalue()


def test_a_folder_that_is_removed_while_the_run_goes_on(tmp_path: Path) -> None:
    """It is made anew, and still tells the run from another; one that another run has taken is left to it."""
    images = make_images(tmp_path / "images", 8)
    ((first, second, printed),) = run_ranks(1, a_removed_folder, images, tmp_path / "run", False)
    assert first is None
    assert second is not None
    assert "holds another run (seed 1337 there, 5 here)" in second
    assert "run was removed while the run went on: made anew at step 4." in printed
    assert (tmp_path / "run/checkpoints/step_00000004").is_dir()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [4]
    (first, _, _), (other, _, _) = run_ranks(2, a_removed_folder, images, tmp_path / "taken", True)
    assert first == other
    assert first is not None
    assert first.startswith("TrainingError: step 4 cannot be saved: ")
    assert "config.json is another run's by now" in first
