"""Write the features of many images to one file.

    python tools/embed_images.py runs/quickstart photos --out photos.npy
    python tools/embed_images.py runs/nepa_b imagenet_val.index --out val.safetensors --features mean --dtype float16
    python tools/embed_images.py runs/nepa_b files.txt --out patches.parquet --features patches --block 8
    torchrun --nproc_per_node 8 tools/embed_images.py runs/nepa_b /data/imagenet/train --out train.npy --device cuda

MODEL is anything that megatron_nepa.load takes. IMAGES is a folder, an index, a tar, Arrow or parquet file, or a .txt
file with the path of an image on each line. Row i of the file belongs to line i of OUT.names.txt (of a .parquet file
the names are a column).

A command that was stopped continues where it was, also with another number of ranks, and ends with the same file.
Memory does not grow with the number of images.
"""

from __future__ import annotations

import argparse
import os

from megatron_nepa.cli import path_argument
from megatron_nepa.terminal import tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint, an exported folder")
    parser.add_argument("images", type=path_argument, metavar="IMAGES", help="folder, index, shards or list of files")
    parser.add_argument("--out", type=path_argument, required=True, help="file ending in .npy, .safetensors, .parquet")
    parser.add_argument(
        "--features",
        choices=["last", "mean", "patches"],
        default="last",
        help="the last patch's token, the mean of the patches, or every patch (default: last)",
    )
    parser.add_argument(
        "--block", type=int, help="block, from 0, whose residual stream is taken (default: the final norm's output)"
    )
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the file (float32)")
    parser.add_argument("--weights", choices=["ema", "raw"], help="default: ema where there is one")
    parser.add_argument("--image_size", type=int, help="side of the crop, pixels (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=32, help="images computed at once (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of which each rank takes its own (default: cpu)")
    parser.add_argument("--compute_dtype", choices=["fp32", "bf16"], default="fp32", help="of the model (fp32)")
    parser.add_argument("--threads", type=int, default=4, help="that decode, on each rank (default: 4)")
    return parser.parse_args(arguments)


def main() -> None:
    """Embed this rank's share, and the last rank joins the parts."""
    args = parse_arguments()
    # bring torch
    from tqdm import tqdm

    import megatron_nepa
    from megatron_nepa.library.embedding import FeatureChoice, embed
    from megatron_nepa.library.pictures import find_pictures
    from megatron_nepa.models.trunk import DTYPES
    from megatron_nepa.parallel.launcher import find_place

    place = find_place(os.environ)
    choice = FeatureChoice(args.features, args.block, args.dtype, args.batch_size)
    device = f"cuda:{place.local_rank}" if args.device == "cuda" else args.device
    pictures = find_pictures(args.images)
    model = megatron_nepa.load(
        args.model, args.weights, device=device, dtype=DTYPES[args.compute_dtype], image_size=args.image_size
    )
    if place.rank == 0:
        print(f"{model.origin}: {args.features} of {len(pictures.names)} images", *pictures.notes, sep="\n", flush=True)
    share = -(-len(pictures.names) // place.world_size)
    shown = None if place.rank == 0 else True  # None: where there is a terminal
    with tqdm(total=share, unit=" images", disable=shown) as bar:
        written = embed(model, pictures, args.out, choice, place, args.threads, bar.update)
    print(f"{written} written" if written else f"rank {place.rank}: its share is done", flush=True)


if __name__ == "__main__":
    with tool("embed_images"):
        main()
