"""Show what a trained trunk attends to and predicts on your images (figures 5 and 7 of the paper).

    python tools/visualize_attention.py cat.jpg --checkpoint runs/quickstart --out figures
    python tools/visualize_attention.py *.jpg   --checkpoint nepa-base-patch14-224 --layers 8-11 --out figures
    python tools/visualize_attention.py cat.jpg --checkpoint runs/nepa_b --square --query 3,5 --heads each --out figures
    python tools/visualize_attention.py cat.jpg --checkpoint runs/nepa_b_release --size 448 --query grid:4 --out figures
    python tools/visualize_attention.py cat.jpg --evolution runs/quickstart --out figures

For every image, OUT gets

    NAME.png             a triplet for each query patch: the query in the image, the attention that it pays to the
                         patches that it sees, and the cosine of the embedding that it predicts and every patch's
                         embedding. Patch t predicts patch t + 1: the next in the row, or the first of the next row.
    NAME_prediction.png  the cosine of every patch's embedding and its prediction, and how much better that is than
                         repeating the patch before it, as a model that learned nothing would.
    NAME_reconstruction.png  instead, of a run of the objective mae or aim: what the trunk sees, what is hidden from it,
                         the pixels that are predicted there, and the original.
    NAME.npz             the arrays, for every layer and head.
    NAME_evolution.png   with --evolution instead of these: one row a checkpoint, and NAME_evolution.npz.

Attention is drawn in multiples of uniform attention, so queries that see few and many patches compare: 1 is what an
even spread over the tokens in sight gives. Patches that a causal query cannot see are blank.

Any image size works: images are resized with their ratio kept, to whole patches (learned positions, which the paper's
recipes have, fit one size only: --square). A checkpoint is a folder such as
OUTPUT_DIR/checkpoints/step_00001000, an OUTPUT_DIR for its newest, a folder of the authors' release, or a file that
convert_checkpoint.py consolidate wrote.
"""

from __future__ import annotations

import argparse

from megatron_nepa.cli import path_argument
from megatron_nepa.terminal import tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=path_argument, metavar="IMG", help="image files")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=path_argument, help="the model; of an OUTPUT_DIR its newest checkpoint")
    model.add_argument(
        "--evolution", type=path_argument, metavar="OUTPUT_DIR", help="a run: one row for each of its checkpoints"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the results; overwrites nothing"
    )
    parser.add_argument(
        "--query",
        nargs="+",
        default=["auto"],
        help="query patches as y,x from 0,0 at the top left; grid:N for N x N evenly spread ones (grid: 3 x 3); auto "
        "(the default) for the patches of most contrast in three bands of the image",
    )
    parser.add_argument(
        "--layers",
        default="all",
        help="blocks whose attention is averaged, from 0: all (default) or a list like 0,3,8-11",
    )
    parser.add_argument(
        "--heads",
        choices=["mean", "max", "each"],
        default="mean",
        help="their mean, the maximum of each patch, or one panel each (default: mean)",
    )
    parser.add_argument(
        "--size", type=int, help="shorter side of the resized image in pixels (default: the model's image size)"
    )
    parser.add_argument(
        "--square",
        action="store_true",
        help="keep the middle square of the image alone",
    )
    parser.add_argument(
        "--bidirectional",
        action="store_true",
        help="let every patch see the whole image, also what it predicts (default: as in the checkpoint's config)",
    )
    parser.add_argument("--weights", choices=["ema", "raw"], help="default: ema where there is one")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="checkpoints of --evolution (default: all, or eight evenly spread)"
    )
    args = parser.parse_args(arguments)
    if args.steps and args.evolution is None:
        parser.error("--steps chooses checkpoints of --evolution")
    return args


def main() -> None:
    """Draw, and say what was written."""
    args = parse_arguments()
    from megatron_nepa.analysis.visualize import View, visualize, visualize_evolution  # bring torch and matplotlib

    view = View(tuple(args.query), args.layers, args.heads, args.size, args.square, args.bidirectional, args.weights)
    if args.evolution is None:
        written = visualize(args.images, args.checkpoint, args.out, view)
    else:
        written = visualize_evolution(args.images, args.evolution, args.out, view, args.steps or ())
    for path in written:
        print(path)


if __name__ == "__main__":
    with tool("visualize_attention"):
        main()
