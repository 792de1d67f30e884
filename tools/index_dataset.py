"""Index a data set once, so that training starts in no time and meets no bad image.

    python tools/index_dataset.py /data/imagenet/train --out train.index
    python tools/index_dataset.py ILSVRC2012_img_train.tar --out train.index
    python tools/index_dataset.py val --labels ground_truth.txt --devkit_meta meta.mat --out val.index
    python tools/index_dataset.py ADEChallengeData2016 --split training --out ade20k.index
    python tools/index_dataset.py imagenet-1k/data --split validation --out val.index
    python tools/index_dataset.py imagenet-1k/data --split train --to_shards shards --out train.index
    python tools/index_dataset.py s3://bucket/imagenet/train --out train.index
    python tools/index_dataset.py "https://host/imagenet-train-{0000..1023}.tar" --out train.index
    python tools/index_dataset.py train.index --to_shards /lustre/shards --resize 512 --out /lustre/shards/index
    python tools/index_dataset.py train.index --overlap val.index       # images that both have, byte for byte
    deepspeed pretrain_nepa.py --data train.index ...

An interrupted run continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.index_file import is_index, load_index
from megatron_nepa.data.index.labels import with_labels
from megatron_nepa.data.index.listing import Known, Source
from megatron_nepa.data.index.sources import list_source, open_source, tables_in
from megatron_nepa.data.index.table_values import NotInPlaceError
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.unpack_tables import unpack_tables
from megatron_nepa.data.indexing.write_shards import check_sizes, require_no_masks, write_shards
from megatron_nepa.terminal import counted, tool

ROWS = 1 << 20  # that are looked at at once


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        help="an ImageFolder tree, a flat folder, a tar file or a folder of tar shards, ImageNet's training archive, "
        "a folder with images/ and annotations/, a folder that Hugging Face's datasets saved, parquet or Arrow files, "
        "the URL of a folder of tar shards or of shards (s3://, gs://, https://, ...), a text file of such URLs, "
        "or an index (with --to_shards or --overlap)",
    )
    parser.add_argument("--out", help="folder of the index; must not exist")
    parser.add_argument("--overlap", metavar="SET", help="write no index, say what of this set is in source too")
    parser.add_argument(
        "--verify",
        choices=["header", "full"],
        default="header",
        help="header parses every header; full decodes every image with the decoder that training uses",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where full decodes")
    parser.add_argument("--workers", type=int, help="processes (default: one a core, at most 4 on a GPU)")
    parser.add_argument("--split", default="training", help="part of a set that has several")
    parser.add_argument("--labels", help="text file: a label a line in name order, or a name and a label a line")
    parser.add_argument("--devkit_meta", help="meta.mat of ImageNet's development kit, for its validation ground truth")
    parser.add_argument(
        "--to_shards", metavar="DIR", help="pack the images into tar shards; the index is of the shards"
    )
    parser.add_argument("--shard_size", type=int, default=10000, help="images of a shard")
    parser.add_argument("--resize", type=int, metavar="SIDE", help="scale images in shards to this shorter side")
    return parser.parse_args(arguments)


def main() -> None:
    """Index, and pack where asked; quarantined images are printed."""
    args = parse_arguments()
    try:
        for name in ("source", "overlap", "out", "to_shards", "labels", "devkit_meta"):
            require(getattr(args, name) != "", f"{name} is empty; give a path (an unset shell variable?).")
        require(args.workers is None or args.workers >= 1, f"--workers is {args.workers}; it must be at least 1.")
        if args.overlap is not None:
            print(overlap(args))
            return
        require(args.out is not None, "give the folder of the index as --out, or a set to compare with as --overlap.")
        require(
            args.resize is None or args.to_shards is not None,
            "--resize scales the images of shards: give --to_shards, or drop it.",
        )
        require(
            args.devkit_meta is None or args.labels is not None,
            "--devkit_meta explains the numbers of --labels: give both, or drop it.",
        )
        if args.to_shards is None:
            index = build_and_save_index(source_of(args), args.out, args.verify, args.device, args.workers)
        else:
            index = pack(args)
    except (ConfigError, UnreadableImageError) as error:
        print(f"index_dataset: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("index_dataset: interrupted; the same command continues.", file=sys.stderr)
        sys.exit(130)
    for name, reason in index.quarantine:
        print(f"left out {name}: {reason}")
    print(
        f"{args.out}: {counted(len(index), 'image')}, {counted(index.num_classes, 'class', 'classes')}, "
        f"{len(index.quarantine)} left out; "
        f"largest {index.width.max()} x {index.height.max()}" + "".join(f"; {note}" for note in index.notes)
    )


def overlap(args: argparse.Namespace) -> str:
    """What the source shares with the set of --overlap, in a sentence."""
    from megatron_nepa.data.indexing.overlap import find_overlap

    for name in ("out", "to_shards", "labels"):
        require(getattr(args, name) is None, f"--overlap compares two sets and writes nothing: drop --{name}.")
    first, second = (
        load_index(path) if is_index(path) else list_source(path, args.split) for path in (args.source, args.overlap)
    )
    found = find_overlap(first, second, args.workers)
    return found.describe(args.source, args.overlap, len(second))


def source_of(args: argparse.Namespace) -> Source:
    """The images of the source, with the labels of --labels where that is given."""
    require(not is_index(args.source), f"{args.source} is an index already: give --to_shards to pack its images.")
    source = open_source(args.source, args.split)
    return source if args.labels is None else Known(with_labels(source.listing(), args.labels, args.devkit_meta))


def pack(args: argparse.Namespace) -> DatasetIndex:
    """Index the source (unless it is an index), write its shards, and index those."""
    check_sizes(args.shard_size, args.resize)  # indexing may take hours
    if is_index(args.source):
        index = load_index(args.source)
    else:
        try:
            source = source_of(args)
        except NotInPlaceError:
            return unpack(args)
        require_no_masks(source.has_masks)
        index = build_and_save_index(source, f"{args.out}.source", args.verify, args.device, args.workers)
    write_shards(index, args.to_shards, args.shard_size, args.resize, args.workers)
    packed = build_and_save_index(open_source(args.to_shards), args.out, "header", args.device, args.workers)
    if not (same_labels(packed, index) and packed.classes == index.classes):
        shutil.rmtree(args.out)
        raise ConfigError(
            f"the tar files of {args.to_shards} do not hold the images and labels that were packed, so others lie "
            "among them: move those away, or choose another folder."
        )
    return replace(packed, notes=index.notes)


def same_labels(one: DatasetIndex, other: DatasetIndex) -> bool:
    """Whether two indexes have the same labels, row by row."""
    starts = range(0, len(one), ROWS)
    return len(one) == len(other) and all(
        np.array_equal(one.label[start : start + ROWS], other.label[start : start + ROWS]) for start in starts
    )


def unpack(args: argparse.Namespace) -> DatasetIndex:
    """Write the shards of tables whose images are compressed, and index those."""
    require(args.labels is None, "--labels is for images without labels of their own: index the shards with it.")
    tables = tables_in(Path(args.source), args.split)
    print(f"{args.source} holds compressed images, which are unpacked into {args.to_shards}")
    unpack_tables(tables, args.to_shards, args.shard_size, args.resize, args.workers)
    index = build_and_save_index(open_source(args.to_shards), args.out, args.verify, args.device, args.workers)
    return replace(index, notes=(*tables.notes, *index.notes))


if __name__ == "__main__":
    with tool("index_dataset"):
        main()
