"""Do the paper's claims hold on a small scale? Its ablations and rival objectives on Fashion-MNIST, one command.

    python examples/ablations/run.py                  # noise, tables 1a, 1c, 1e, 9 and 2, figure 3
    python examples/ablations/run.py --second         # tables 1b, 1d, 6, 7 and 8 and figure 4 as well
    python examples/ablations/run.py --quick --output_dir runs/ablations_quick    # a few steps of everything

First the baseline is trained with five seeds, from whose spread the steps of all other cells are chosen and written
down. Every cell is a pre-training without labels and a fine-tuning with 10 % of them, three seeds each, one core a
cell. Each finished cell is kept in results.json, so that the same command goes on where it was stopped, on another day
or another machine (take the file along); RESULTS.md and its figures are written from it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from examples.fashion_mnist.data import DEBIAN_FOLDER, prepare  # noqa: E402
from megatron_nepa.config import require  # noqa: E402
from megatron_nepa.terminal import tool  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, train what is missing, report."""
    options = parse_arguments(arguments)
    require(options.jobs >= 1, f"--jobs is {options.jobs}; it must be at least 1.")
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}

    # imported here: --help does not wait for them
    from examples.ablations.cells import OBJECTIVES
    from examples.ablations.comparison import Comparison
    from examples.ablations.figures import cells as shown
    from examples.ablations.lengths import Lengths
    from examples.ablations.report import write_report
    from examples.ablations.results import Results
    from examples.ablations.study import QUICK, Scale, Study
    from examples.ablations.tables import FIRST, SECOND

    output, work = options.output_dir.resolve(), options.work_dir.resolve()
    prepare(options.source, work / "data")
    results = Results(output / "results.json")
    scale = QUICK if options.quick else Scale()
    study = Study(results, scale, work / "data", work / "runs", options.jobs)
    study.measure_noise()
    comparison, lengths = Comparison(study, tuple(OBJECTIVES)), Lengths(study)

    def report() -> None:
        write_report(study, (*FIRST, *SECOND), comparison, lengths, output / "RESULTS.md")

    study.run([*study.all_cells(FIRST), *shown(study)], "tables and curves")
    report()
    comparison.train()
    report()
    if options.second:
        study.run(study.all_cells(SECOND), "tables of the second part")
        lengths.train()
        report()
    print(f"{output}/RESULTS.md")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, default=DEBIAN_FOLDER, help=f"the data set's idx files ({DEBIAN_FOLDER})"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent, help="results.json, RESULTS.md, figures (beside this)"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=Path("runs/ablations"), help="photographs and runs under way (runs/ablations)"
    )
    parser.add_argument("--second", action="store_true", help="train the tables of the second part as well")
    parser.add_argument("--quick", action="store_true", help="a few steps of every cell: shows that all of it works")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"trainings at a time, one core each ({cores})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with tool("ablations"):
        main()
