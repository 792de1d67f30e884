"""Times the order of the images: which images a batch shows, of up to a billion of them."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from dataclasses import asdict, dataclass

import numpy as np

from megatron_nepa.config import require
from megatron_nepa.data.sampling.order import image_of_sample

SIZES = (1_281_167, 100_000_000, 1_000_000_000)
SEED = 0


@dataclass(frozen=True)
class Timing:
    """What the order of one set takes.

    Attributes:
        images: number of images in the set.
        microseconds: median time of a batch.
        slowest: of a batch, the 99th percentile, microseconds.
        peak_mb: the most memory that the order allocated, an epoch's start included.
    """

    images: int
    microseconds: float
    slowest: float
    peak_mb: float


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
    return Timing(images, statistics.median(times), float(np.percentile(times, 99)), peak)


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
    print(f"{'images':>14s}{f'us / {options.batch}':>10s}{'99 %':>8s}{'peak MB':>10s}")
    for timing in timings:
        print(f"{timing.images:14,d}{timing.microseconds:10.0f}{timing.slowest:8.0f}{timing.peak_mb:10.2f}")
