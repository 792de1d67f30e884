"""The ablations: what a cell is, how the noise chooses the steps, verdicts, the report; when slow, real trainings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from examples.ablations import study as studies
from examples.ablations.cells import OBJECTIVES, PRETRAINING_RATE, Cell, Pretraining
from examples.ablations.comparison import Comparison
from examples.ablations.judge import Noise, compare, pool
from examples.ablations.lengths import Lengths
from examples.ablations.report import write_report
from examples.ablations.results import Results
from examples.ablations.study import Scale, Study
from examples.ablations.tables import FIRST, SCRATCH, SECOND, Row
from examples.ablations.worker import _train
from examples.fashion_mnist.data import prepare
from megatron_nepa.config import ConfigError, override
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, PROBING_RECIPES
from tests.examples.test_fashion_mnist import source  # noqa: F401

PROJECT = Path(__file__).parents[2]
SCALE = Scale(candidates=(10, 20, 40), finetuning=10)
_UNTRAINED_LAST = "untrained trunk, last embedding"


def accuracy_of(cell: Cell) -> float:
    """A made-up world: longer pre-training helps, the seeds differ, two variants fail or cost."""
    spread = 0.002 * (cell.seed % 3 - 1)
    if cell.start is None:
        return 0.80 + spread
    cost = 0.05 * sum(name in ("objective.shift", "model.causal") for name, _ in cell.start.changes)
    return 0.80 + 0.0005 * cell.start.steps - cost + spread


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study whose cells cost nothing."""

    def run(self: Study, cells: list[Cell], title: str) -> None:
        record = {"seconds": 36.0, "machine": "a CPU", "date": "2026-01-01", "failed": None}
        for cell in cells:
            self.results.cells[cell.key] = {**record, "accuracy": accuracy_of(cell), "flops_per_image": 1e6}
            if cell.start is not None:
                last = {"loss": -0.9, "target_effective_rank": 20.0}
                curves = {"step": [1.0, 2.0], "loss": [-0.5, -0.9], "grad_norm": [1.0, 0.1]}
                flops = {"nepa": 1e6}.get(cell.start.objective, 5e5)
                self.results.pretrainings[cell.start.key] = {
                    **record,
                    "last": last,
                    "curves": curves,
                    "flops_per_image": flops,
                }
        self.results.save()

    monkeypatch.setattr(studies.Study, "run", run)
    return Study(Results(tmp_path / "results.json"), SCALE, tmp_path / "data", tmp_path / "runs", jobs=1)


def test_noise_chooses_the_fewest_steps_that_pay(study: Study) -> None:
    study.measure_noise()
    # the seeds' deviation is 0.0017 here: four of them are gained with 20 steps (0.010), not with 10 (0.005)
    assert study.steps == 20
    assert study.noise.deviation == pytest.approx(0.0016733, rel=1e-3)
    assert study.noise.degrees_of_freedom == 4 * (5 - 1)  # three lengths, and from scratch
    chosen = json.loads((study.results.path).read_text())["plan"]
    study.results.plan = {**chosen, "steps": 40}
    study.measure_noise()
    assert study.steps == 40  # what is written down stays


def test_verdicts() -> None:
    noise = Noise(0.01, 4)
    high, low, near = [0.90, 0.91, 0.92], [0.80, 0.81, 0.82], [0.89, 0.90, 0.91]
    assert compare(high, low, noise).verdict == "holds"
    assert compare(low, high, noise).verdict == "does not hold"
    assert compare(high, near, noise).verdict == "within noise"
    # that two are level is refuted by a difference, and proved by none
    assert [compare(high, other, noise, is_level=True).verdict for other in (low, near)] == [
        "does not hold",
        "within noise",
    ]
    # three equal accuracies do not mean that there is no noise
    found = compare([0.82] * 3, [0.80] * 3, noise)
    assert (found.verdict, found.difference) == ("within noise", pytest.approx(0.02))
    # Student's t of 4 degrees of freedom, where a normal distribution's 1.96 would have found one
    assert found.bound == pytest.approx(2.7764 * 0.01 * (2 / 3) ** 0.5, rel=1e-4)
    assert noise.bound([0.5, 0.5], [0.4, 0.6]) == pytest.approx(2.7764 * (0.0001 / 2 + 0.02 / 2) ** 0.5, rel=1e-4)
    assert str(found) == "**within noise** (+2.00 points, noise up to 2.27)"


def test_the_noise_is_that_of_all_settings() -> None:
    found = pool([0.3, 0.4], num_seeds=5)
    assert (found.deviation, found.degrees_of_freedom) == (pytest.approx((0.25 / 2) ** 0.5), 8)


def test_cells_are_known_by_their_settings(study: Study) -> None:
    study.measure_noise()
    tables = {table.name: study.cells_of(table) for table in FIRST}
    baseline = tables["1a"]["NEPA"]
    assert baseline == tables["1c"]["0 %"] == tables["1e"]["bidirectional"] == tables["9"]["SwiGLU"]  # trained once
    causal = tables["1e"]["causal"]
    assert [cell.start for cell in causal] == [cell.start for cell in baseline]  # one pre-training, two fine-tunings
    cells = {cell.key for cells in tables.values() for row in cells.values() for cell in row}
    assert len(cells) == 3 * (1 + 3 + 2 + 1 + 1)
    # a key is part of results that are kept: another one would train them again
    assert Pretraining("nepa", (), 1000, 0).key == "059d5006a971"


def test_equal_trainings_are_one_task(study: Study) -> None:
    study.measure_noise()
    study.results.cells.clear()
    same, repeated = (study.cell(row, 0) for row in (Row("", ""), Row("", "", {"optimizer.base_lr": PRETRAINING_RATE})))
    other = study.cell(Row("", "", finetuning={"model.causal": "true"}), 0)
    assert same.start != repeated.start
    (task,) = study._tasks([same, repeated, other])  # one folder: two processes would write into it
    assert {cell.key for cell in task.cells} == {same.key, other.key}


def test_results_of_another_scale_are_refused(study: Study) -> None:
    study.measure_noise()
    study.scale = replace(SCALE, finetuning=20)
    with pytest.raises(ConfigError, match=r"fine-tuning 10 on 10 % of the labels; here .* 20 on 10 %"):
        study.measure_noise()


def test_every_cell_is_a_run_that_can_start(study: Study) -> None:
    study.measure_noise()
    cells = study.all_cells((*FIRST, *SECOND))
    cells += [cell for row in study.sweep(tuple(OBJECTIVES)).values() for cell in row]
    cells += [cell for row in Lengths(study).sweep.values() for cell in row]
    recipes = {"fine-tuning": CLASSIFICATION_RECIPES, "probe": PROBING_RECIPES}
    for cell in cells:
        shape = {}
        if cell.start is not None:
            given = {name: parsed(value) for name, value in cell.start.flags.items() if name != "recipe"}
            override(PRETRAINING_RECIPES[str(cell.start.flags["recipe"])](), given)
            shape = {name: value for name, value in given.items() if name.startswith("model.")}  # of the checkpoint
        given = {name: parsed(value) for name, value in cell.flags.items() if name != "recipe"}
        override(recipes[cell.use][str(cell.flags["recipe"])](), {**shape, **given})


def parsed(value: object) -> object:
    """A flag's text as the command line reads it."""
    return {"true": True, "false": False, "none": None}.get(value, value) if isinstance(value, str) else value


def test_the_report(study: Study) -> None:
    study.measure_noise()
    comparison, lengths = Comparison(study, tuple(OBJECTIVES)), Lengths(study)
    study.run(study.all_cells(FIRST), "")
    path = study.results.path.with_name("RESULTS.md")
    write_report(study, (*FIRST, *SECOND), comparison, lengths, path)
    assert [line.split(":")[0] for line in path.read_text().splitlines() if line.startswith("## Table")] == [
        f"## Table {table.name}" for table in FIRST
    ]  # what is not trained is not told
    comparison.train()
    study.run(study.all_cells(SECOND), "")
    lengths.train()
    write_report(study, (*FIRST, *SECOND), comparison, lengths, path)
    text = path.read_text()
    assert "| 20 steps | 80.96 ± 0.17 |" in text
    assert "The causal mask helps. **holds** (+5.00 points, noise up to 0." in text
    # twenty steps are worth a point over training from scratch there, also without the stop-gradient
    assert "Without the stop-gradient it fails in the same way. **does not hold** (-1.04 points" in text
    assert "- At equal steps NEPA is ahead of training from scratch. **holds** (+1.00 points" in text
    # all are equal there
    assert "It is the lowest for NEPA and MAE and JEPA and AIM and training from scratch: a wider search" in text
    assert "QK-norm changes MAE little. **within noise** (+0.00 points" in text
    assert "A probe reaches less than fine-tuning. **within noise** (+0.00 points" in text
    # the made-up world gains 0.05 points a step
    assert "- 40 steps are better than 20. **holds** (+1.00 points" in text
    verdicts = [text.count(f"**{verdict}**") for verdict in ("holds", "within noise", "does not hold")]
    told = "Verdicts on {} claims: holds {}, within noise {}, does not hold {}."
    assert told.format(sum(verdicts), *verdicts) in text
    assert path.with_name("lengths.png").is_file()


def test_equal_steps_and_flops(study: Study) -> None:
    study.measure_noise()
    comparison = Comparison(study, tuple(OBJECTIVES))
    comparison.train()
    # a step of the others takes half of NEPA's FLOPs there, one of 64 photographs with labels as many an image
    assert [cell.pretrained.steps for cell in comparison.at_flops("mae")] == [40] * 3
    steps, flops = comparison.at_steps(SCRATCH), comparison.at_flops(SCRATCH)
    assert {cell.steps for cell in steps} == {20 + 10}
    assert {cell.steps for cell in flops} == {40 + 10}


def test_a_probe_is_another_cell_than_a_fine_tuning(study: Study) -> None:
    study.measure_noise()
    (probe,) = [table for table in SECOND if table.name == "6"]
    cells = study.cells_of(probe)
    last, untrained, tuned = (cells[name][0] for name in ("last embedding", _UNTRAINED_LAST, "fine-tuned instead"))
    assert last.start == tuned.start
    assert last.key != tuned.key
    assert untrained.pretrained.steps == 1
    assert untrained.pretrained.learning_rate < 1e-11


def test_what_holds_no_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"cells": []')
    with pytest.raises(ConfigError, match="holds no results of the study"):
        Results(path)


@pytest.mark.slow
def test_the_command(source: Path, tmp_path: Path) -> None:  # noqa: F811
    prepare(source, tmp_path / "work/data")  # here, where the data set is the fixture's small one
    folders = ["--source", str(source), "--output_dir", str(tmp_path / "out"), "--work_dir", str(tmp_path / "work")]
    command = [sys.executable, "examples/ablations/run.py", "--quick", *folders]
    first = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    results = (tmp_path / "out/results.json").read_text()
    assert (tmp_path / "out/curves.png").is_file()
    again = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "steps/s" not in again.stderr  # nothing is trained twice
    assert (tmp_path / "out/results.json").read_text() == results


def test_an_evaluation_after_a_stop_belongs_to_the_last_step(tmp_path: Path) -> None:
    """And a process that was suspended has computed no longer than its other steps say."""

    def script(arguments: Sequence[str]) -> None:
        common = {"grad_norm": 1.0, "tflops_per_device": 1.0}
        rows = [{"step": 1, "loss": 2.0, "step_ms": 500.0, **common}]
        rows += [{"step": 2, "loss": 1.5, "step_ms": 60_000.0, **common}]
        rows += [{"step": 3, "loss": 1.0, "step_ms": 500.0, **common}]
        rows += [{"step": 3, "val_top1": 0.75}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    record = _train(script, {"output_dir": tmp_path, "global_batch_size": 64})
    assert record["seconds"] == 1.5
    assert (record["last"]["loss"], record["last"]["val_top1"]) == (1.0, 0.75)
    assert record["curves"]["loss"] == [2.0, 1.5, 1.0]


def test_what_is_committed_is_the_results(tmp_path: Path) -> None:
    """The report and its figures are those of results.json, and every accuracy that the pages name is in the report."""
    folder = PROJECT / "examples/ablations"
    results = Results(folder / "results.json")
    study = Study(results, Scale(), tmp_path, tmp_path, jobs=1)
    comparison, lengths = Comparison(study, tuple(OBJECTIVES)), Lengths(study)
    write_report(study, (*FIRST, *SECOND), comparison, lengths, tmp_path / "RESULTS.md")
    report = (folder / "RESULTS.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == report
    pages = {"README.md": ("**NEPA beside", "\n\n"), "docs/paper_and_release.md": ("claims hold on a small", "\n## ")}
    for page, (first, last) in pages.items():
        told = (PROJECT / page).read_text().partition(first)[2].partition(last)[0]
        accuracies = re.findall(r"\d\d\.\d\d(?: ± \d\.\d\d)?", told)
        assert accuracies
        assert [accuracy for accuracy in accuracies if accuracy not in report] == []
