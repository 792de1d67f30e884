"""Times the order of the images, and an index: which images a batch shows and where they lie, up to a billion of them.

The index is of sparse files, so that a billion rows take no disk: what is timed is this code and the system's mapping
of pages, not a disk. A page of 4 kB comes into memory for each row that is touched in each of seven columns; the system
takes it back where memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nepa.config import require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.sampling.order import image_of_sample

SIZES = (1_281_167, 100_000_000, 1_000_000_000)
SEED = 0
_INDEX_BATCHES = 200  # at most; of a billion rows each touches 7 MB of pages


@dataclass(frozen=True)
class Timing:
    """What the order of one set takes.

    Attributes:
        images: number of images in the set.
        microseconds: median time of a batch.
        slowest: of a batch, the 99th percentile, microseconds.
        peak_mb: the most memory that the order allocated, an epoch's start included.
        open_ms: opening an index of that many rows, with its fingerprint.
        rows_ms: order and rows of a batch from the index, mean over the batches.
        resident_mb: pages of the index that came into memory meanwhile.
    """

    images: int
    microseconds: float
    slowest: float
    peak_mb: float
    open_ms: float
    rows_ms: float
    resident_mb: float


def measure(images: int, batch: int, batches: int) -> Timing:
    """Time batches in a row that go through the start of an epoch."""
    first = images - images % batch - batches // 2 * batch
    starts = [first + number * batch for number in range(batches)]
    image_of_sample(SEED, np.arange(batch), images)  # numpy's own first steps
    tracemalloc.start()  # numpy reports to it
    for start in starts[:: max(1, batches // 8)]:
        image_of_sample(SEED, np.arange(start, start + batch), images)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    times = []
    for start in starts:
        samples = np.arange(start, start + batch)
        before = time.perf_counter()
        image_of_sample(SEED, samples, images)
        times.append((time.perf_counter() - before) * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        opening, rows, resident = _measure_index(
            sparse_index(Path(folder), images), batch, min(batches, _INDEX_BATCHES)
        )
    return Timing(images, statistics.median(times), float(np.percentile(times, 99)), peak, opening, rows, resident)


def sparse_index(folder: Path, images: int) -> Path:
    """An index of ``images`` rows of zeros, in sparse files."""
    zero = np.zeros(1, np.int32)
    path = folder / "index"
    save_index(DatasetIndex(folder, PackedNames.pack([""]), zero, zero, zero), path)
    kinds: dict[str, type[np.integer[Any]]] = {
        **dict.fromkeys(("width", "height", "label", "shard"), np.int32),
        **dict.fromkeys(("offset", "size", "names_ends"), np.int64),
    }
    for name, kind in kinds.items():
        np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=kind, shape=(images,))
    facts = json.loads((path / "index.json").read_text())
    facts |= {"images": images, "arrays": {file.name: file.stat().st_size for file in path.glob("*.npy")}}
    (path / "index.json").write_text(json.dumps(facts))
    return path


def _measure_index(path: Path, batch: int, batches: int) -> tuple[float, float, float]:
    """Milliseconds of opening, of a batch's rows, and the growth of this process in MB."""
    start, before = time.perf_counter(), _resident_mb()
    index = load_index(path)
    index.fingerprint()
    opened = time.perf_counter()
    for number in range(batches):
        images = image_of_sample(SEED, np.arange(number * batch, (number + 1) * batch), len(index))
        for column in (index.width, index.height, index.label, index.shard, index.offset, index.size, index.names.ends):
            column[images]
    end = time.perf_counter()
    return (opened - start) * 1e3, (end - opened) / batches * 1e3, _resident_mb() - before


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tools/benchmark.py order``."""
    parser.add_argument("--batch", type=int, default=256, help="images of a batch")
    parser.add_argument("--batches", type=int, default=2000, help="batches that are timed of each size")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    for name in ("batch", "batches"):
        require(getattr(options, name) >= 1, f"--{name} is {getattr(options, name)}; it must be at least 1.")
    timings = [measure(images, options.batch, options.batches) for images in SIZES]
    if options.json:
        print(json.dumps({"batch": options.batch, "timings": [asdict(timing) for timing in timings]}))
        return
    print(
        f"{'images':>14s}{f'us / {options.batch}':>10s}{'99 %':>8s}{'peak MB':>10s}"
        f"{'open ms':>10s}{'rows ms':>10s}{'pages MB':>10s}"
    )
    for timing in timings:
        print(
            f"{timing.images:14,d}{timing.microseconds:10.0f}{timing.slowest:8.0f}{timing.peak_mb:10.2f}"
            f"{timing.open_ms:10.1f}{timing.rows_ms:10.2f}{timing.resident_mb:10.0f}"
        )
