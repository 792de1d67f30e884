"""RESULTS.md and its figures, from what the trainings logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.ablations.cells import Cell
from examples.ablations.comparison import Comparison
from examples.ablations.figures import draw_figures
from examples.ablations.judge import STANDARD_ERRORS
from examples.ablations.lengths import Lengths
from examples.ablations.study import NEEDED_GAIN, QUICK, Study
from examples.ablations.tables import Table
from examples.fashion_mnist.spread import in_percent
from megatron_nepa.files import replace_text
from megatron_nepa.terminal import counted

COMMAND = "python examples/ablations/run.py"


def write_report(study: Study, tables: Sequence[Table], comparison: Comparison, lengths: Lengths, path: Path) -> None:
    """Write the report and, beside it, its figures: of all that has been trained so far, whichever start trained it.

    Args:
        study: with the results of all cells.
        tables: of the paper.
        comparison: of the objectives.
        lengths: of pre-training.
        path: of the Markdown file.
    """
    sections = [_head(study), _noise(study)]
    sections += [_table(study, table) for table in tables if all(map(study.has, study.cells_of(table).values()))]
    if comparison.is_trained:
        sections.append(comparison.describe())
    figures = draw_figures(study, path.parent)
    sections += [f"## {title}\n\n![{title}]({name})" for title, name in figures]
    if lengths.is_trained:
        lengths.draw(path.with_name("lengths.png"))
        sections.append(lengths.describe("lengths.png"))
    replace_text(path, "\n\n".join(sections) + "\n")


def _head(study: Study) -> str:
    results = study.results
    hours, machines, dates = results.cost()
    quick = "**A few steps of everything: they show that all of it runs, and say nothing of the paper.**\n\n"
    return (
        f"# The paper's ablations on Fashion-MNIST\n\n{quick if study.scale == QUICK else ''}"
        f"Written by `{COMMAND}` from the trainings' own logs: {len(results.pretrainings)} pre-trainings and "
        f"{len(results.cells)} fine-tunings, {hours:.1f} core-hours on {', '.join(machines)}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}.\n\n"
        "The paper's accuracies are of ImageNet and ViT-B or larger after 50,000 steps and more; here a network of "
        "0.4 million parameters sees 28 x 28 pixels. What can agree is the direction of a difference, not its size."
    )


def _noise(study: Study) -> str:
    plan = study.results.plan
    assert plan is not None
    lines = [
        "## Noise, and the steps that it chose",
        "",
        "| pre-training | accuracy, % |",
        "|---|---|",
        f"| none | {in_percent(*plan['scratch'])} |",
        *(f"| {steps:,} steps | {in_percent(mean, spread)} |" for steps, mean, spread in plan["candidates"]),
        "",
        f"Mean and standard deviation of {len(study.scale.noise_seeds)} seeds; {plan['percent']} % of the labels, "
        f"{plan['finetuning_steps']:,} steps of fine-tuning, 10,000 test photographs. The steps of every cell below "
        f"were fixed from this table on {plan['date']}, before the others ran: {plan['steps']:,}, the fewest at which "
        f"pre-training is worth {NEEDED_GAIN:.0f} standard deviations (the most, where none is). With "
        f"{counted(len(study.scale.seeds), 'seed')} each, two variants differ by more than noise (beyond "
        f"{STANDARD_ERRORS:.0f} standard errors) from {100 * plan['detectable']:.2f} points on.",
    ]
    return "\n".join(lines)


def _table(study: Study, table: Table) -> str:
    cells = study.cells_of(table)
    lines = [
        f"## Table {table.name}: {table.title}",
        "",
        "| | paper, % | here, % | last loss | effective rank of the targets |",
        "|---|---|---|---|---|",
    ]
    for row in table.rows:
        found = cells[row.label]
        lines.append(f"| {row.label} | {row.paper} | {study.spread(found)} | {_health(study, found)} |")
    lines += ["", *(f"- {study.judged(claim, cells)}" for claim in table.claims)]
    return "\n".join(lines)


def _health(study: Study, cells: Sequence[Cell]) -> str:
    losses, ranks = [], []
    for cell in cells:
        last = study.results.pretraining(cell.pretrained)["last"]
        losses.append(last.get("loss", float("nan")))
        ranks.append(last.get("target_effective_rank"))
    rank = f"{np.mean(ranks):.1f}" if None not in ranks else "-"  # pixels have none
    return f"{np.mean(losses):.4f} | {rank}"
