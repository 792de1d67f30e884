"""RESULTS.md and its figures, from what the trainings logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from examples.ablations.cells import Cell
from examples.ablations.comparison import Comparison
from examples.ablations.figures import describe_curves
from examples.ablations.judge import CONFIDENCE, Finding, Verdict
from examples.ablations.lengths import Lengths
from examples.ablations.study import NEEDED_GAIN, QUICK, Study
from examples.ablations.tables import Claim, Table
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
    trained = [table for table in tables if all(map(study.has, study.cells_of(table).values()))]
    findings = [found for table in trained for found in _findings(study, table)]
    findings += comparison.findings() if comparison.is_trained else []
    findings += lengths.findings() if lengths.is_trained else []
    sections = [_head(study, lengths.is_trained), _noise(study, findings), *(_table(study, table) for table in trained)]
    if comparison.is_trained:
        sections.append(comparison.describe())
    sections.append(describe_curves(study, path.parent))
    if lengths.is_trained:
        lengths.draw(path.with_name("lengths.png"))
        sections.append(lengths.describe("lengths.png"))
    replace_text(path, "\n\n".join(filter(None, sections)) + "\n")


def _head(study: Study, is_whole: bool) -> str:
    results = study.results
    hours, machines, dates = results.cost()
    is_quick = study.scale == QUICK
    quick = "**A few steps of everything: they show that all of it runs, and say nothing of the paper.**\n\n"
    flags = " --quick" * is_quick + " --second" * is_whole
    return (
        f"# The paper's ablations on Fashion-MNIST\n\n{quick if is_quick else ''}"
        f"Written by `{COMMAND}{flags}` from the trainings' own logs: {len(results.pretrainings)} pre-trainings and "
        f"{len(results.cells)} trainings with labels (fine-tuning, from scratch or a probe), {hours:.1f} core-hours of "
        f"steps on {', '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.\n\n"
        "The paper's accuracies are of ImageNet and ViT-B or larger after 50,000 steps and more; here a network of "
        "0.4 million parameters sees 28 x 28 pixels. What can agree is the direction of a difference, not its size."
    )


def _noise(study: Study, findings: Sequence[tuple[Claim, Finding]]) -> str:
    plan, noise = study.results.plan, study.noise
    assert plan is not None
    alone = [0.0] * len(study.scale.seeds)
    verdicts = [finding.verdict for _, finding in findings]
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
        f"pre-training is worth {NEEDED_GAIN:.0f} standard deviations (the most, where none is).",
        "",
        f"The deviations pooled are {100 * noise.deviation:.2f} points ({noise.degrees_of_freedom} degrees of "
        f"freedom). With {counted(len(alone), 'seed')} each, two variants differ by more than noise (Student's t, "
        f"{100 * CONFIDENCE:.0f} %) from {100 * noise.bound(alone, alone):.2f} points on at the least, and from more "
        "where their own seeds lie further apart. Where nothing differs, one verdict in twenty is beyond noise by "
        "chance.",
        "",
        f"Verdicts on {len(verdicts)} claims: "
        f"{', '.join(f'{verdict} {verdicts.count(verdict)}' for verdict in get_args(Verdict))}.",
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
    lines += ["", *([table.note, ""] if table.note else [])]
    lines += [f"- {claim.sentence} {finding}" for claim, finding in _findings(study, table)]
    return "\n".join(lines)


def _findings(study: Study, table: Table) -> list[tuple[Claim, Finding]]:
    cells = study.cells_of(table)
    return [(claim, study.judge(claim, cells)) for claim in table.claims]


def _health(study: Study, cells: Sequence[Cell]) -> str:
    losses, ranks = [], []
    for cell in cells:
        last = study.results.pretraining(cell.pretrained)["last"]
        losses.append(last.get("loss", float("nan")))
        ranks.append(last.get("target_effective_rank"))
    rank = f"{np.mean(ranks):.1f}" if None not in ranks else "-"  # pixels have none
    return f"{np.mean(losses):.4f} | {rank}"
