"""Table 2 at this scale: objectives at equal steps and at equal FLOPs, each with its best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from examples.ablations.cells import Cell, batch_size
from examples.ablations.judge import Finding
from examples.ablations.study import SWEEP, Study
from examples.ablations.tables import SCRATCH, Claim

NAMES = {"nepa": "NEPA", "mae": "MAE", "jepa": "JEPA", "aim": "AIM", SCRATCH: "training from scratch"}
PAPER = {"nepa": "85.3", "mae": "85.6", "jepa": "85.2", "aim": ""}  # Large
SETUP = (
    "All objectives train one trunk, NEPA's with SwiGLU, RoPE and QK-norm, and are fine-tuned as suits NEPA. "
    "JEPA's encoder is its average, as published; of the others the weights themselves are fine-tuned. "
    "Of 4 x 4 patches, JEPA's target blocks of 15 to 20 % are 1 to 4."
)


class Comparison:
    """Trains and describes the comparison.

    Args:
        study: whose noise is known.
        objectives: keys of :data:`~examples.ablations.cells.OBJECTIVES`, NEPA first.
    """

    def __init__(self, study: Study, objectives: Sequence[str]) -> None:
        self.study, self.sweep = study, study.sweep(objectives)

    def train(self) -> None:
        """The learning rates first; the rest with the best of each."""
        self.study.run([cell for cells in self.sweep.values() for cell in cells], "Table 2: learning rates")
        self.study.run(self._compared(), "Table 2")

    @property
    def is_trained(self) -> bool:
        """Whether all of it was."""
        has = self.study.has
        return all(map(has, self.sweep.values())) and has(self._compared())

    def at_steps(self, name: str) -> list[Cell]:
        """Cells of an objective, or from scratch, with as many steps as NEPA's, pre-training and fine-tuning."""
        study = self.study
        if name == SCRATCH:
            return self._from_scratch(study.steps + study.scale.finetuning)
        return self._cells(name, study.steps)

    def at_flops(self, name: str) -> list[Cell]:
        """Cells with as many FLOPs as NEPA's: forward, backward and what else a step computes."""
        study = self.study
        steps = max(1, round(study.steps / self._flops(name)))
        if name == SCRATCH:
            return self._from_scratch(steps + study.scale.finetuning)
        return self._cells(name, steps)

    def describe(self) -> str:
        """The section of the report."""
        lines = [
            "## Table 2: objectives",
            "",
            "| | paper (Large), % | equal steps, % | equal FLOPs, % | FLOPs of a step, NEPA = 1 | learning rate |",
            "|---|---|---|---|---|---|",
            *(self._row(name) for name in self.sweep),
            "",
            f"{SETUP} The learning rate of each is the best of {len(SWEEP)} on 5,000 training photographs that "
            f"fine-tuning does not see, with one seed ({self._sweep_hours():.1f} core-hours), and serves at equal "
            f"FLOPs, too. {self._ends()}Equal FLOPs count forward, backward and target encoders. From scratch the "
            "network is trained with the labels for all steps that the others pre-train and fine-tune.",
            "",
            *(f"- {claim.sentence} {finding}" for claim, finding in self.findings()),
        ]
        return "\n".join(lines)

    def findings(self) -> list[tuple[Claim, Finding]]:
        """Where NEPA stands beside the others: as the paper has it, and beside AIM, which it lacks."""
        found = []
        for how, cells_of in (("steps", self.at_steps), ("FLOPs", self.at_flops)):
            cells = {name: cells_of(name) for name in self.sweep}
            for better, worse in (("mae", "nepa"), ("nepa", "jepa"), ("nepa", SCRATCH), ("nepa", "aim")):
                if better in cells and worse in cells:
                    sentence = f"At equal {how} {NAMES[better]} is ahead of {NAMES[worse]}."
                    claim = Claim(sentence, better, worse)
                    found.append((claim, self.study.judge(claim, cells)))
        return found

    def _row(self, name: str) -> str:
        study = self.study
        rate = study.best(self.sweep[name]).learning_rate
        steps, flops = (study.spread(cells) for cells in (self.at_steps(name), self.at_flops(name)))
        label = NAMES[name] if name in PAPER else name
        return f"| {label} | {PAPER.get(name, '')} | {steps} | {flops} | {self._flops(name):.2f} | {rate:.1e} |"

    def _compared(self) -> list[Cell]:
        return [cell for name in self.sweep for cell in (*self.at_steps(name), *self.at_flops(name))]

    def _sweep_hours(self) -> float:
        results = self.study.results
        trained = [cell for cells in self.sweep.values() for cell in cells]
        starts = {cell.start.key for cell in trained if cell.start is not None}
        records = [results.cells[cell.key] for cell in trained] + [results.pretrainings[key] for key in starts]
        return sum(float(record["seconds"]) for record in records) / 3600

    def _ends(self) -> str:
        """Whose best learning rate is the lowest or the highest that was tried."""
        found = []
        for end, name in ((0, "lowest"), (-1, "highest")):
            here = [NAMES[o] for o in self.sweep if self.study.best(self.sweep[o]) == self.sweep[o][end]]
            if here:
                found.append(f"the {name} for {' and '.join(here)}")
        return f"It is {', '.join(found)}: a wider search may favour them. " if found else ""

    def _cells(self, objective: str, steps: int) -> list[Cell]:
        return self.study.with_all_seeds(self.study.best(self.sweep[objective]), steps)

    def _from_scratch(self, steps: int) -> list[Cell]:
        return self.study.with_all_seeds(replace(self.study.best(self.sweep[SCRATCH]), steps=steps))

    def _flops(self, name: str) -> float:
        """Of a step, NEPA's being 1."""
        return self._step_flops(self.sweep[name][0]) / self._step_flops(self.sweep["nepa"][0])

    def _step_flops(self, cell: Cell) -> float:
        """Of a step of the cell's pre-training or, from scratch, of its own."""
        results, start = self.study.results, cell.start
        record, flags = (
            (results.cells[cell.key], cell.flags) if start is None else (results.pretraining(start), start.flags)
        )
        return float(record["flops_per_image"]) * batch_size(flags)
