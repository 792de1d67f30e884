"""Look at a data set before training: its first samples as the run will see them, and what it consists of.

    python tools/preview_data.py /data/imagenet/train --recipe nepa_b --out sheet.png
    python tools/preview_data.py train.index --recipe imagenet_ft_b --out sheet.png --seed 3
    python tools/preview_data.py a.index=0.7,photos=0.3 --recipe nepa_b --out sheet.png
    python tools/preview_data.py ADEChallengeData2016 --recipe ade20k_upernet_b --count 8 --out sheet.png

DATA is an index, anything that tools/index_dataset.py reads, or a mixture of such. Each sample is drawn twice: stored,
with its crop framed, and as the training pipeline hands it to the model: cropped, mirrored, augmented, with the patches
in grey that the mask token replaces. Other flags are those of the recipe's training script, such as
--data.crop_scale_min 0.2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nepa.cli import parse_command_line, path_argument
from megatron_nepa.config import ConfigError, PretrainingConfig, RunConfig, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import read_sizes
from megatron_nepa.data.index.index_file import is_index, load_index
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.mixture_grammar import BLOCK, read_mixture
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, PROBING_RECIPES, SEGMENTATION_RECIPES
from megatron_nepa.terminal import tool


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the flags that are the run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", type=path_argument, metavar="DATA", help="an index, a folder, an archive, tables or a mixture"
    )
    parser.add_argument("--recipe", default="quickstart", help="of the run (default: quickstart)")
    parser.add_argument("--out", type=path_argument, required=True, metavar="PNG", help="the picture")
    parser.add_argument("--count", type=int, default=16, help="samples that are drawn (default: 16)")
    parser.add_argument("--split", default="training", help="part of a set that has several")
    return parser.parse_known_args(arguments)


def run_of(recipe: str, data: Path, flags: list[str]) -> RunConfig:
    """The run that a recipe of any task gives, with the user's flags."""
    given = ["--recipe", recipe, "--data", str(data), *flags]
    known: list[str] = []
    for recipes in (PRETRAINING_RECIPES, CLASSIFICATION_RECIPES, SEGMENTATION_RECIPES, PROBING_RECIPES):
        if recipe in recipes:
            run: RunConfig = parse_command_line(given, "", recipes).run  # type: ignore[arg-type]
            return run
        known += recipes
    raise ConfigError(f"--recipe {recipe} is unknown; there are {', '.join(known)}.")


def images_of(args: argparse.Namespace, run: RunConfig) -> DatasetIndex | Mixture:
    """The set or mixture to look at, with the sizes of its images."""

    def open_one(path: str) -> DatasetIndex:
        return load_index(path) if is_index(path) else read_sizes(list_source(path, args.split))

    parts = read_mixture(str(args.data))
    if parts is None:
        return open_one(str(args.data))
    require(
        isinstance(run, PretrainingConfig),
        f"{args.data} is a mixture of sets, which pre-training alone draws from, not --recipe {args.recipe}: give one.",
    )
    from megatron_nepa.data.loaders.sources import mixture_of  # brings torch

    return mixture_of(parts, open_one)


def main() -> None:
    """Draw the sheet and print the summary."""
    args, flags = parse_arguments()
    from megatron_nepa.analysis.data_summary import DataSummary  # bring torch, DALI and matplotlib
    from megatron_nepa.analysis.preview import first_samples
    from megatron_nepa.analysis.preview_sheet import draw_sheet

    require(args.out.suffix == ".png", f"--out {args.out} is no PNG file: give a name that ends in .png.")
    require(args.out.parent.is_dir(), f"--out {args.out}: there is no folder {args.out.parent}.")
    run = run_of(args.recipe, args.data, flags)
    index = images_of(args, run)
    side = run.model.image_size
    if isinstance(index, Mixture):
        summaries = [DataSummary.of(source.index, side) for source in index.sources]
        for source, own in zip(index.sources, summaries, strict=True):
            print(f"{source.name}, {source.per_block / BLOCK:.2%} of the samples:")
            print(*(f"  {line}" for line in (*own.lines(), *source.index.notes)), sep="\n")
        summary = DataSummary.joined(summaries)
    else:
        summary = DataSummary.of(index, side)
        print(*summary.lines(), *index.notes, sep="\n")
    samples = first_samples(run, index, min(args.count, len(index)))
    headline = f"{args.data}: the first {len(samples)} samples of {args.recipe}, seed {run.seed}"
    explained = f"left: stored, with the crop framed; right: as the model is given it, {side} x {side} pixels"
    draw_sheet(args.out, samples, summary, f"{headline}\n{explained}")
    print(args.out)


if __name__ == "__main__":
    with tool("preview_data"):
        main()
