"""Classes or masks of images without labels, from a fine-tuned model.

    python tools/predict.py runs/imagenet_ft_b photos --out photos.csv
    python tools/predict.py runs/imagenet_ft_b files.txt --out files.jsonl --top 5
    python tools/predict.py runs/ade20k_upernet_b photos --out masks

MODEL is anything that megatron_nepa.load takes: a run of finetune_classification.py gives a row an image, the most
probable classes with their probabilities; one of finetune_segmentation.py gives a folder with, for each image,

    NAME.png           a palette image of the image's own size, whose values are the classes' numbers
    NAME.overlay.jpg   the image in grey under its classes' colours

IMAGES is a folder, an index, a tar, Arrow or parquet file, or a .txt file with the path of an image on each line. A
stopped command continues with the masks that are missing; a table is written whole or not at all.
"""

from __future__ import annotations

import argparse

from megatron_nepa.cli import path_argument
from megatron_nepa.terminal import tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a fine-tuned run or an exported folder")
    parser.add_argument("images", type=path_argument, metavar="IMAGES", help="folder, index, shards or list of files")
    parser.add_argument("--out", type=path_argument, required=True, help="a .csv or .jsonl file; of masks a folder")
    parser.add_argument("--top", type=int, default=1, help="classes of an image (default: 1)")
    parser.add_argument("--weights", choices=["ema", "raw"], help="default: ema where there is one")
    parser.add_argument("--batch_size", type=int, default=32, help="images classified at once (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the model (default: fp32)")
    parser.add_argument("--threads", type=int, default=4, help="that decode (default: 4)")
    return parser.parse_args(arguments)


def main() -> None:
    """Predict, and say what was written."""
    args = parse_arguments()
    # bring torch
    from tqdm import tqdm

    import megatron_nepa
    from megatron_nepa.config import require
    from megatron_nepa.library.pictures import find_pictures
    from megatron_nepa.library.prediction import predict_classes, predict_masks
    from megatron_nepa.models.classifier import Classifier
    from megatron_nepa.models.segmenter import Segmenter
    from megatron_nepa.models.trunk import DTYPES

    require(args.batch_size >= 1, f"--batch_size is {args.batch_size}; it must be at least 1.")
    require(
        args.out.resolve() != args.images.resolve(),
        f"--out {args.out} is the folder of the images: choose another, so that no mask takes an image's place.",
    )
    pictures = find_pictures(args.images)
    model = megatron_nepa.load(args.model, args.weights, device=args.device, dtype=DTYPES[args.dtype])
    require(
        isinstance(model.module, Classifier | Segmenter),
        f"{args.model} holds no head: fine-tune it with examples/finetune_classification.py or "
        "examples/finetune_segmentation.py, or take its features with tools/embed_images.py.",
    )
    print(f"{model.origin}: {len(pictures.names)} images", *pictures.notes, sep="\n", flush=True)
    with tqdm(total=len(pictures.names), unit=" images", disable=None) as bar:
        if isinstance(model.module, Classifier):
            predict_classes(model, pictures, args.out, args.top, args.batch_size, args.threads, bar.update)
        else:
            predict_masks(model, pictures, args.out, args.threads, bar.update)
    print(f"{args.out} written", flush=True)


if __name__ == "__main__":
    with tool("predict"):
        main()
