"""Table 2 at this scale: objectives at equal steps and at equal FLOPs, each with its best learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from examples.ablations.cells import Cell
from examples.ablations.judge import Verdict, compare
from examples.ablations.study import SCRATCH, SWEEP, Study

NAMES = {"nepa": "NEPA", "mae": "MAE", "jepa": "JEPA", "aim": "AIM"}
_STANDING: dict[Verdict, str] = {
    "holds": "is ahead of",
    "within noise": "is level with",
    "does not hold": "is behind",
}
PAPER = {"nepa": "85.3", "mae": "85.6", "jepa": "85.2", "aim": "", SCRATCH: ""}  # Large


class Comparison:
    """Trains and describes the comparison.

    Args:
        study: whose noise is known.
        objectives: keys of :data:`~examples.ablations.cells.OBJECTIVES`, NEPA first.
    """

    def __init__(self, study: Study, objectives: Sequence[str]) -> None:
        self.study, self.objectives = study, objectives
        self.sweep = study.sweep(objectives)

    def train(self) -> None:
        """The learning rates first; the rest with the best of each."""
        self.study.run([cell for cells in self.sweep.values() for cell in cells], "Table 2: learning rates")
        equal = [
            cell for objective in self.objectives for cell in (*self.at_steps(objective), *self.at_flops(objective))
        ]
        self.study.run([*equal, *self.scratch()], "Table 2")

    @property
    def is_trained(self) -> bool:
        """Whether all of it was."""
        has, objectives = self.study.has, self.objectives
        return (
            all(map(has, self.sweep.values()))
            and all(has(self.at_steps(name)) and has(self.at_flops(name)) for name in objectives)
            and has(self.scratch())
        )

    def at_steps(self, objective: str) -> list[Cell]:
        """An objective's cells, each with the steps of NEPA."""
        return self._cells(objective, self.study.steps)

    def at_flops(self, objective: str) -> list[Cell]:
        """An objective's cells, each with the FLOPs of NEPA: forward, backward and what else a step computes."""
        own, nepa = (self._flops(name) for name in (objective, "nepa"))
        return self._cells(objective, max(1, round(self.study.steps * nepa / own)))

    def scratch(self) -> list[Cell]:
        """The network trained on the labels alone."""
        return self.study.with_all_seeds(self.study.best(self.sweep[SCRATCH]))

    def describe(self) -> str:
        """The section of the report."""
        study = self.study
        lines = [
            "## Table 2: objectives",
            "",
            "| | paper (Large), % | equal steps, % | equal FLOPs, % | FLOPs of a step, NEPA = 1 | learning rate |",
            "|---|---|---|---|---|---|",
        ]
        for objective in self.objectives:
            share = self._flops(objective) / self._flops("nepa")
            rate = study.best(self.sweep[objective]).pretrained.learning_rate
            steps, flops = (study.spread(cells) for cells in (self.at_steps(objective), self.at_flops(objective)))
            lines.append(f"| {NAMES[objective]} | {PAPER[objective]} | {steps} | {flops} | {share:.2f} | {rate:.1e} |")
        lines.append(f"| {SCRATCH} | | {study.spread(self.scratch())} | | | |")
        trained = [cell for cells in self.sweep.values() for cell in cells]
        seconds = sum(study.results.cells[cell.key]["seconds"] for cell in trained)
        starts = {cell.start.key for cell in trained if cell.start is not None}
        seconds += sum(study.results.pretrainings[key]["seconds"] for key in starts)
        lines += [
            "",
            f"The learning rate of each is the best of {len(SWEEP)} on 5,000 training photographs that fine-tuning "
            f"does not see ({seconds / 3600:.1f} core-hours). {self._ends()}Equal FLOPs count forward, backward and "
            "target encoders.",
            "",
        ]
        nepa = study.accuracies(self.at_steps("nepa"))
        for objective in self.objectives[1:]:
            for how, cells in (("steps", self.at_steps(objective)), ("FLOPs", self.at_flops(objective))):
                verdict = compare(nepa, study.accuracies(cells), study.noise)
                lines.append(f"- At equal {how} NEPA {_STANDING[verdict]} {NAMES[objective]}.")
        verdict = compare(nepa, study.accuracies(self.scratch()), study.noise)
        lines.append(f"- NEPA {_STANDING[verdict]} training from scratch.")
        return "\n".join(lines)

    def _ends(self) -> str:
        """Whose best learning rate is the lowest or the highest that was tried."""
        found = []
        for end, name in ((0, "lowest"), (-1, "highest")):
            here = [NAMES[o] for o in self.objectives if self.study.best(self.sweep[o]) == self.sweep[o][end]]
            if here:
                found.append(f"the {name} for {' and '.join(here)}")
        return f"It is {', '.join(found)}: a wider search may favour them. " if found else ""

    def _cells(self, objective: str, steps: int) -> list[Cell]:
        return self.study.with_all_seeds(self.study.best(self.sweep[objective]), steps)

    def _flops(self, objective: str) -> float:
        start = self.sweep[objective][0].pretrained
        return float(self.study.results.pretraining(start)["flops_per_image"])
