"""Packs an indexed data set into tar shards in the WebDataset layout, for file systems that dislike small files."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.archives import CLASSES_FILE
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import open_image
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.index.tar_members import sample_key
from megatron_nepa.data.indexing.lock import claimed

_JPEG_QUALITY = 95
FACTS_FILE = "shards.json"  # what the shards of a folder were made from


def write_shards(
    index: DatasetIndex,
    folder: str | Path,
    shard_size: int,
    shorter_side: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write the images of ``index``, in its order, into ``folder``/shard_000000.tar, shard_000001.tar, ...

    Each image keeps its name (``key.jpg``) unless another of its shard has the same WebDataset key, and is followed by
    its class number (``key.cls``) where it has one; class names go to classes.json. A shard is written beside and
    renamed, and one that is already there is kept, so the same call continues after an interruption.

    Args:
        index: what to pack.
        folder: where the shards go; made if missing.
        shard_size: images of a shard.
        shorter_side: scale images down to this shorter side (bicubic, JPEG quality 95); None and images that are
            small enough keep their bytes.
        workers: threads; None takes one a core.
        progress: show a progress bar.

    Raises:
        ConfigError: a shard size or shorter side below 1, an index of image and mask pairs, a folder of other shards or
            that another process is writing, or an image that cannot be read or scaled, by name.
    """
    check_sizes(shard_size, shorter_side)
    require_no_masks(len(index.masks) > 0)
    target = Path(folder)
    facts = {"images": index.fingerprint(), "shard_size": shard_size, "shorter_side": shorter_side}
    mismatch = f"{target} holds shards of other images or another size: remove them, or choose another folder."
    with claimed(target / FACTS_FILE, facts, mismatch):
        write_classes(target, index.classes)
        _write_missing(index, target, shard_size, shorter_side, workers or os.cpu_count() or 1, progress)


def check_sizes(shard_size: int, shorter_side: int | None) -> None:
    """Refuse a shard size or shorter side below 1.

    Raises:
        ConfigError: naming it.
    """
    require(shard_size >= 1, f"the shard size is {shard_size}; it must be at least 1.")
    require(
        shorter_side is None or shorter_side >= 1, f"the shorter side is {shorter_side}; it must be at least 1 pixel."
    )


def require_no_masks(has_masks: bool) -> None:
    """Refuse pairs of image and mask.

    Raises:
        ConfigError: they are.
    """
    require(not has_masks, "image and mask pairs stay in their folders: shards hold images and labels only.")


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Keep the classes' names beside the shards; none removes those of shards that were there before."""
    if classes:
        (folder / CLASSES_FILE).write_text(json.dumps(classes))
    else:
        (folder / CLASSES_FILE).unlink(missing_ok=True)


def missing_shards(folder: Path, count: int, shard_size: int) -> list[tuple[range, Path]]:
    """The rows and path of every shard that is not there yet, of ``count`` rows in all."""
    starts = range(0, count, shard_size)
    shards = [(start, folder / f"shard_{number:06d}.tar") for number, start in enumerate(starts)]
    return [(range(start, min(start + shard_size, count)), path) for start, path in shards if not path.exists()]


def in_threads(
    write: Callable[[range, Path], None],
    shards: Sequence[tuple[range, Path]],
    workers: int,
    done: Callable[[], object] | None = None,
) -> None:
    """Write shards in threads: reading, decoding, scaling and encoding all run outside Python's lock.

    Args:
        write: one shard, of the rows that it is given. Where it fails, those that were not begun are left out.
        shards: rows and path of each.
        workers: number of threads.
        done: called in this thread for each shard that is written, in their order.
    """
    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(write, rows, path) for rows, path in shards]
        try:
            for task in tasks:
                task.result()
                if done is not None:
                    done()
        finally:
            for task in tasks:
                task.cancel()


def _write_missing(
    index: DatasetIndex, target: Path, shard_size: int, shorter_side: int | None, workers: int, progress: bool
) -> None:
    store = ImageStore(index)

    def write(rows: range, path: Path) -> None:
        write_shard(path, _members(index, store, rows, shorter_side))

    missing = missing_shards(target, len(index), shard_size)
    with tqdm(total=len(missing), unit=" shards", disable=not progress) as bar:
        in_threads(write, missing, workers, bar.update)
    store.close()


def _members(
    index: DatasetIndex, store: ImageStore, rows: range, shorter_side: int | None
) -> Iterator[tuple[str, bytes]]:
    for i, name in zip(rows, _distinct_keys([index.names[i] for i in rows]), strict=True):
        stem, extension = os.path.splitext(name)
        try:
            data = store.read(i).tobytes()
            if shorter_side is not None and min(index.width[i], index.height[i]) > shorter_side:
                data, extension = scaled(data, shorter_side), ".jpg"
        except Exception as error:  # PIL raises a dozen types on damaged files
            raise ConfigError(
                f"{index.where(i)} cannot be packed ({error}): index the images anew with --verify full, which leaves "
                "such images out."
            ) from error
        yield stem + extension, data
        if index.label[i] >= 0:
            yield sample_key(name)[0] + ".cls", str(int(index.label[i])).encode()


def _distinct_keys(names: list[str]) -> list[str]:
    """The names of a shard's images, each of whose WebDataset keys names one image: a.jpg and a.png are one sample."""
    keys = [sample_key(name)[0] for name in names]
    count = Counter(keys)
    taken = {key for key in keys if count[key] == 1}
    distinct = []
    for name, key in zip(names, keys, strict=True):
        if count[key] > 1 or key.endswith("/") or not key:
            stem, extension = os.path.splitext(name)
            folder, base = os.path.split(stem)
            key = plain = os.path.join(folder, f"{base}{extension}".replace(".", "_"))
            number = 1
            while key in taken:
                number += 1
                key = f"{plain}_{number}"
            taken.add(key)
            name = key + extension
        distinct.append(name)
    return distinct


def scaled(data: bytes, shorter_side: int) -> bytes:
    """A JPEG of the image with that shorter side."""
    with open_image(io.BytesIO(data)) as image:
        # EXIF orientation is not carried over: training ignores it, and so sees the same picture
        scale = shorter_side / min(image.size)
        size = tuple(int(np.rint(side * scale)) for side in image.size)
        buffer = io.BytesIO()
        image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0
        )
    return buffer.getvalue()


def write_shard(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    """Write a tar file of members, each a name and its content, beside ``path`` and rename it there."""
    beside = path.with_suffix(".tmp")
    with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)  # no time and no owner: the same images give the same bytes
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    beside.rename(path)
