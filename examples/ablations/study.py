"""The study's order: the noise first, then the learning rates, then the tables; each from what came before."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.ablations.cells import FINETUNING_RATE, PRETRAINING_RATE, Cell, Pretraining, frozen
from examples.ablations.judge import Finding, Noise, compare, pool
from examples.ablations.results import Results, today
from examples.ablations.tables import SCRATCH, Claim, Row, Table
from examples.ablations.worker import Outcome, Task, begin, carry_out
from examples.fashion_mnist.spread import deviation, in_percent
from megatron_nepa.config import ConfigError, require

NEEDED_GAIN = 4.0  # standard deviations of the baseline, that pre-training must be worth over training from scratch
SWEEP = (0.5, 1.0, 2.0)  # factors of the learning rate


@dataclass(frozen=True)
class Scale:
    """How long the study trains.

    Attributes:
        candidates: steps of pre-training of which one is chosen, rising.
        finetuning: steps of fine-tuning and of training from scratch.
        seeds: of every cell.
        noise_seeds: of the baseline.
        percent: of the labels that fine-tuning sees.
    """

    candidates: tuple[int, ...] = (500, 1000, 2000)
    finetuning: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    noise_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    percent: int = 10


QUICK = Scale(candidates=(8,), finetuning=8, seeds=(0,), noise_seeds=(0, 1), percent=1)


class Study:
    """Trains what is missing and remembers everything.

    Args:
        results: what is known.
        scale: how long to train.
        data: folder of the prepared photographs.
        folder: of runs that are under way.
        jobs: processes, one core each.
    """

    def __init__(self, results: Results, scale: Scale, data: Path, folder: Path, jobs: int) -> None:
        self.results, self.scale = results, scale
        self.data, self.folder, self.jobs = data, folder, jobs

    def measure_noise(self) -> None:
        """Train the baseline with all its seeds; choose the steps of every other cell and write them down.

        The steps are the fewest candidates at which pre-training gains NEEDED_GAIN standard deviations over training
        from scratch, else the most.
        """
        scale = self.scale
        scratch = [self.from_scratch(seed) for seed in scale.noise_seeds]
        starts = {steps: [self.baseline(seed, steps) for seed in scale.noise_seeds] for steps in scale.candidates}
        self._require_same_scale()
        self.run([*scratch, *(cell for cells in starts.values() for cell in cells)], "noise")
        if self.results.plan is not None:
            return
        floor = self.accuracies(scratch)
        tried = []
        for steps, cells in starts.items():
            found = self.accuracies(cells)
            tried.append((steps, float(np.mean(found)), deviation(found)))
        enough = [t for t in tried if t[1] - np.mean(floor) >= NEEDED_GAIN * max(t[2], deviation(floor))]
        steps, *_ = enough[0] if enough else tried[-1]
        self.results.plan = {
            "steps": steps,
            "candidates": [list(t) for t in tried],
            "scratch": [float(np.mean(floor)), deviation(floor)],
            "finetuning_steps": scale.finetuning,
            "percent": scale.percent,
            "date": today(),
        }
        self.results.save()

    def _require_same_scale(self) -> None:
        """Refuse to go on with the results of another scale, whose steps would be taken for this one's."""
        plan, scale = self.results.plan, self.scale
        if plan is None:
            return
        ours = [list(scale.candidates), scale.finetuning, scale.percent]
        theirs = [[steps for steps, *_ in plan["candidates"]], plan["finetuning_steps"], plan["percent"]]
        require(
            ours == theirs,
            f"{self.results.path} is of a study with other steps (pre-training {theirs[0]}, fine-tuning {theirs[1]} on "
            f"{theirs[2]} % of the labels; here {ours[0]}, {ours[1]} on {ours[2]} %): choose another --output_dir.",
        )

    @property
    def steps(self) -> int:
        """Of pre-training, as the noise chose them."""
        assert self.results.plan is not None
        return int(self.results.plan["steps"])

    @property
    def noise(self) -> Noise:
        """Of the baseline at every length, and without pre-training."""
        plan = self.results.plan
        assert plan is not None
        settings = [*(spread for _, _, spread in plan["candidates"]), plan["scratch"][1]]
        return pool(settings, len(self.scale.noise_seeds))

    def baseline(self, seed: int, steps: int) -> Cell:
        """NEPA as the study trains it."""
        return self.cell(Row("", ""), seed, steps)

    def from_scratch(self, seed: int) -> Cell:
        """The network trained on the labels alone, for the steps of fine-tuning."""
        return Cell(None, self.scale.finetuning, seed, percent=self.scale.percent)

    def cell(self, row: Row, seed: int, steps: int | None = None) -> Cell:
        """A row's cell of one seed."""
        start = Pretraining(row.objective, frozen(row.pretraining), row.steps or steps or self.steps, seed)
        changes = frozen(row.finetuning)
        return Cell(start, self.scale.finetuning, seed, changes, percent=self.scale.percent, use=row.use)

    def cells_of(self, table: Table) -> dict[str, list[Cell]]:
        """A table's cells by the label of their row."""
        return {row.label: [self.cell(row, seed) for seed in self.scale.seeds] for row in table.rows}

    def all_cells(self, tables: Iterable[Table]) -> list[Cell]:
        """All tables' cells."""
        return [cell for table in tables for found in self.cells_of(table).values() for cell in found]

    def sweep(self, objectives: Sequence[str]) -> dict[str, list[Cell]]:
        """The cells that choose each objective's learning rate, on photographs that are not the test's."""
        cells = {
            objective: [
                replace(
                    self.cell(Row("", "", {"optimizer.base_lr": PRETRAINING_RATE * factor}, objective=objective), 0),
                    split="held_out",
                )
                for factor in SWEEP
            ]
            for objective in objectives
        }
        cells[SCRATCH] = [
            replace(
                self.from_scratch(0), changes=frozen({"optimizer.base_lr": FINETUNING_RATE * factor}), split="held_out"
            )
            for factor in SWEEP
        ]
        return cells

    def best(self, cells: Sequence[Cell]) -> Cell:
        """The cell with the highest accuracy, the first of equal ones; a failed training counts as 0."""
        return max(cells, key=lambda cell: self.results.accuracy(cell) or 0.0)

    def with_all_seeds(self, chosen: Cell, steps: int | None = None) -> list[Cell]:
        """A setting that was chosen on held-out photographs, on the test's: a cell for each seed.

        Args:
            chosen: with the setting.
            steps: of pre-training; None: its own.
        """
        cells = []
        for seed in self.scale.seeds:
            start = chosen.start
            if start is not None:
                start = replace(start, steps=steps or start.steps, seed=seed)
            cells.append(replace(chosen, start=start, seed=seed, split="test"))
        return cells

    def accuracies(self, cells: Iterable[Cell]) -> list[float]:
        """Of cells that were trained; a failed one counts as 0.1, the accuracy of a guess."""
        return [0.1 if value is None else value for value in map(self.results.accuracy, cells)]

    def has(self, cells: Iterable[Cell]) -> bool:
        """Whether all of them were trained."""
        return all(cell.key in self.results.cells for cell in cells)

    def spread(self, cells: Sequence[Cell]) -> str:
        """Mean and deviation of cells in per cent, and how many of them failed."""
        found = self.accuracies(cells)
        failed = sum(self.results.accuracy(cell) is None for cell in cells)
        note = f" ({failed} of {len(cells)} failed)" if failed else ""
        return f"{in_percent(float(np.mean(found)), deviation(found))}{note}"

    def judge(self, claim: Claim, cells: Mapping[str, Sequence[Cell]]) -> Finding:
        """Whether a claim about the rows of ``cells``, or about training from scratch, holds here."""
        scratch = {SCRATCH: [self.from_scratch(seed) for seed in self.scale.noise_seeds]}
        better, worse = (self.accuracies({**scratch, **cells}[label]) for label in (claim.better, claim.worse))
        return compare(better, worse, self.noise, claim.is_level)

    def run(self, cells: Iterable[Cell], title: str) -> None:
        """Train those of the cells that no one has trained, with a progress bar in steps.

        Raises:
            ConfigError: where a training refuses its settings, or was stopped.
        """
        tasks = self._tasks(cells)
        if not tasks:
            return
        context = multiprocessing.get_context("spawn")
        # processes of this call alone: what trainings leave behind in one does not pile up over the whole study
        pool = ProcessPoolExecutor(self.jobs, context, begin, (self.folder / "logs",))
        try:
            with tqdm(total=sum(map(_steps, tasks)), desc=title, unit=" steps") as bar:
                running = {pool.submit(carry_out, task): task for task in tasks}
                for done in as_completed(running):
                    outcome: Outcome = done.result()
                    self.results.add(outcome.pretraining, outcome.cells)
                    if outcome.stopped is not None:
                        raise ConfigError(f"stopped; the same command goes on ({outcome.stopped})")
                    bar.update(_steps(running[done]))
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # it saves what it trains, for the next start
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _tasks(self, cells: Iterable[Cell]) -> list[Task]:
        """Missing cells, those of one pre-training together, long ones first."""
        # by key: a flag that repeats the study's own value makes no other training, whose folder it would share
        missing: dict[str, dict[str, Cell]] = {}
        for cell in cells:
            if cell.key not in self.results.cells:
                missing.setdefault(cell.key if cell.start is None else cell.start.key, {})[cell.key] = cell
        tasks = []
        for key, found in missing.items():
            together = tuple(found.values())
            is_known = key in self.results.pretrainings
            tasks.append(Task(together[0].start, together, self.data, self.folder, is_known))
        return sorted(tasks, key=_steps, reverse=True)


def _steps(task: Task) -> int:
    """Of a task, counted in pre-training's of 128 photographs."""
    return (task.start.steps if task.start is not None else 0) + sum(cell.steps for cell in task.cells) // 2
