"""Times an index: opening it and serving the encoded images of random batches, up to a billion rows, and what a rank's
memory does meanwhile.

The index is of sparse files, whose zeros cost no disk, under places that are computed: row i lies where image i modulo
a few thousand lies in real tar shards. So every row has its own place in the index and real bytes. What is timed is
this code, the system's mapping of pages and its cache, not a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nepa.benchmarks.order import SIZES
from megatron_nepa.config import DataConfig, require
from megatron_nepa.data.decoding.sample_reader import SampleReader
from megatron_nepa.data.index.builtin import builtin_folder
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import read_sizes, scan_folder
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.index.index_writer import COLUMNS, JSON_FILE
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.indexing.write_shards import write_shards
from megatron_nepa.data.sampling.order import SetOrder, crop_boxes
from megatron_nepa.data.sampling.rank_share import Share

SEED, SCALE_MIN, THREADS = 0, 0.2, 2
SHARD_SIZE = 500
_CHECKED = 20  # points at which memory is looked at


@dataclass(frozen=True)
class Timing:
    """What an index of one size takes.

    Attributes:
        images: rows of the index.
        open_ms: opening it, with its fingerprint.
        first_ms: from there to the bytes and boxes of the first batch.
        images_per_second: encoded images served, over all batches.
        mb_per_second: their bytes.
        batches: that were served, through the start of an epoch.
        settled_mb: memory of this process after a twentieth of the batches.
        peak_mb: the most at any later look.
    """

    images: int
    open_ms: float
    first_ms: float
    images_per_second: float
    mb_per_second: float
    batches: int
    settled_mb: float
    peak_mb: float


def measure(images: int, real: DatasetIndex, folder: Path, batch: int, batches: int) -> Timing:
    """Serve batches that go through the start of an epoch.

    Args:
        images: rows of the index.
        real: images in shards, whose bytes are served.
        folder: for the sparse files.
        batch: images of a batch.
        batches: at least 20.
    """
    path = sparse_index(folder, images)
    start = time.perf_counter()
    index = load_index(path)
    index.fingerprint()
    opened = time.perf_counter()
    index = with_places(index, real)
    share = Share(batch, batch, 1, 0, 1, 0, 1)
    first = max(0, images // batch - batches // 2)
    store = ImageStore(index)
    config, order = DataConfig(), SetOrder(SEED, len(index))
    reader = SampleReader(index, config, THREADS, order, share.local_samples, lambda sample, image: store.read(image))
    size, first_ms, memory = 0, 0.0, []
    for number in range(first, first + batches):
        contents, shown = reader(number)
        crop_boxes(SEED, share.local_samples(number), index.width[shown], index.height[shown], SCALE_MIN)
        size += sum(len(content) for content in contents)
        done = number - first + 1
        first_ms = first_ms or (time.perf_counter() - opened) * 1e3
        if done % (batches // _CHECKED) == 0:
            memory.append(_resident_mb())
    seconds = time.perf_counter() - opened
    reader.close()
    return Timing(
        images,
        (opened - start) * 1e3,
        first_ms,
        batches * batch / seconds,
        size / seconds / 1e6,
        batches,
        memory[0],
        max(memory[1:]),
    )


def sparse_index(folder: Path, images: int) -> Path:
    """An index of ``images`` rows of zeros, in sparse files."""
    zero = np.zeros(1, np.int32)
    path = folder / "index"
    save_index(DatasetIndex(folder, PackedNames.pack([""]), zero, zero, zero), path)
    for name, kind in (COLUMNS | {"names_ends": np.int64}).items():
        np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=kind, shape=(images,))
    facts = json.loads((path / JSON_FILE).read_text())
    facts |= {"images": images, "arrays": {file.name: file.stat().st_size for file in path.glob("*.npy")}}
    (path / JSON_FILE).write_text(json.dumps(facts))
    return path


class _Computed(np.ndarray[Any, np.dtype[Any]]):
    """Zeros on disk, plus a value that the number of the row tells."""

    values: npt.NDArray[Any]

    def __getitem__(self, rows: Any) -> Any:
        return self.view(np.ndarray)[rows] + self.values[np.mod(rows, len(self.values))]


def with_places(zeros: DatasetIndex, real: DatasetIndex) -> DatasetIndex:
    """An index of zeros whose rows lie where those of ``real`` lie, again and again."""
    columns: dict[str, Any] = {}
    for name in ("width", "height", "shard", "offset", "size"):
        columns[name] = getattr(zeros, name).view(_Computed)
        columns[name].values = np.asarray(getattr(real, name))
    return replace(zeros, root=real.root, shards=real.shards, stamps=real.stamps, **columns)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tools/benchmark.py index``."""
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument(
        "--batches",
        type=int,
        default=10_000,
        help="batches that are served from the largest index; of the others a fifth",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    require(options.batch >= 1, f"--batch is {options.batch}; it must be at least 1.")
    require(options.batches >= _CHECKED, f"--batches is {options.batches}; it must be at least {_CHECKED}.")
    timings = []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(scan_folder(builtin_folder()), Path(folder) / "shards", SHARD_SIZE, progress=False)
        real = read_sizes(list_source(Path(folder) / "shards"))
        for images in SIZES:
            with tempfile.TemporaryDirectory() as sparse:
                # memory is looked at for longest where a rank would take most
                batches = options.batches if images == max(SIZES) else max(_CHECKED, options.batches // 5)
                timings.append(measure(images, real, Path(sparse), options.batch, batches))
    if options.json:
        print(json.dumps({"batch": options.batch, "timings": [asdict(timing) for timing in timings]}))
        return
    print(
        f"{'images':>14s}{'open ms':>10s}{'first ms':>10s}{'images/s':>10s}{'MB/s':>8s}{'batches':>10s}{'MB':>8s}"
        f"{'at most':>9s}"
    )
    for timing in timings:
        print(
            f"{timing.images:14,d}{timing.open_ms:10.1f}{timing.first_ms:10.1f}{timing.images_per_second:10.0f}"
            f"{timing.mb_per_second:8.0f}{timing.batches:10,d}{timing.settled_mb:8.0f}{timing.peak_mb:9.0f}"
        )
