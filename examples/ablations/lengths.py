"""Figure 4 at this scale: accuracy after a light search of the learning rate against the length of pre-training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.ablations.cells import FINETUNING_RATE, Cell, frozen
from examples.ablations.judge import Finding
from examples.ablations.study import SWEEP, Study
from examples.ablations.tables import Claim
from examples.fashion_mnist.spread import deviation
from megatron_nepa.training.reporting.plot_style import BLUE, STYLE, save_figure

CAUSAL = {"model.causal": "true"}  # as the paper fine-tunes for this figure


class Lengths:
    """Fine-tunes pre-trainings of every length with the best of a few learning rates.

    Args:
        study: whose noise is known.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sweep = {
            steps: [
                replace(
                    study.baseline(0, steps),
                    changes=frozen({**CAUSAL, "optimizer.base_lr": FINETUNING_RATE * factor}),
                    split="held_out",
                )
                for factor in SWEEP
            ]
            for steps in study.scale.candidates
        }

    def train(self) -> None:
        """The learning rates first."""
        self.study.run([cell for cells in self.sweep.values() for cell in cells], "Figure 4: learning rates")
        self.study.run([cell for steps in self.sweep for cell in self.best(steps)], "Figure 4")

    @property
    def is_trained(self) -> bool:
        """Whether all of it was."""
        study = self.study
        return all(study.has(cells) and study.has(self.best(steps)) for steps, cells in self.sweep.items())

    def best(self, steps: int) -> list[Cell]:
        """The cells of one length, on the test photographs."""
        return self.study.with_all_seeds(self.study.best(self.sweep[steps]))

    def draw(self, path: Path) -> None:
        """Mean accuracy with its deviation against the steps of pre-training."""
        found = [100 * np.array(self.study.accuracies(self.best(steps))) for steps in self.sweep]
        with rc_context(STYLE):
            figure = Figure(figsize=(5.0, 3.2), layout="constrained")
            axes = figure.subplots()
            means, spreads = [values.mean() for values in found], [deviation(values) for values in found]
            axes.errorbar(list(self.sweep), means, spreads, color=BLUE, marker="o", capsize=3, linewidth=1.4)
            axes.set(xlabel="steps of pre-training", ylabel="accuracy, %", xscale="log")
            axes.set_xticks(list(self.sweep), [f"{steps:,}" for steps in self.sweep])
            axes.minorticks_off()
            save_figure(figure, path)

    def describe(self, picture: str) -> str:
        """The section of the report."""
        study = self.study
        cells = {f"{steps:,}": self.best(steps) for steps in self.sweep}
        lines = [
            "## Figure 4: length of pre-training",
            "",
            f"![Accuracy against the length of pre-training]({picture})",
            "",
            "| steps of pre-training | here, % |",
            "|---|---|",
        ]
        lines += [f"| {steps} | {study.spread(found)} |" for steps, found in cells.items()]
        lines += [
            "",
            f"Causal fine-tuning; for each length the best of {len(SWEEP)} learning rates on 5,000 training "
            "photographs that fine-tuning does not see.",
            "",
        ]
        lines += [f"- {claim.sentence} {finding}" for claim, finding in self.findings()]
        return "\n".join(lines)

    def findings(self) -> list[tuple[Claim, Finding]]:
        """Whether each length is better than the one before."""
        cells = {f"{steps:,}": self.best(steps) for steps in self.sweep}
        claims = [Claim(f"{long} steps are better than {short}.", long, short) for short, long in pairwise(cells)]
        return [(claim, self.study.judge(claim, cells)) for claim in claims]
