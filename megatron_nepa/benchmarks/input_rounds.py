"""What the benchmarks of the pre-training input share: images, crops, rounds of contenders, flags and a table."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_nepa.config import DataConfig, require
from megatron_nepa.data.decoding.crop_stream import CropStream
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.index.builtin import cache_folder, photograph_files
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share

IMAGE_SIZE, SCALE_MIN, SEED = 224, 0.08, 0
SETTLE_SECONDS = 0.4  # a contender that was just timed fills its queue again: not at the next one's expense

NextBatch = Callable[[], Tensor]  # [batch, 3, 224, 224]


def sample_images(count: int = 300) -> Path:
    """A folder of ``count`` 500 x 375 JPEGs (quality 90) cut from the built-in photographs, made on first use.

    Cut, not scaled: scaled-up pictures are smooth, and cheaper to decode than photographs are.
    """
    target = cache_folder() / f"benchmark-500x375-{count}"
    if target.is_dir():
        return target
    photographs = [Image.open(file).convert("RGB") for file in photograph_files()]
    large = [image for image in photographs if image.width >= 500 and image.height >= 375]
    target.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        folder = Path(beside) / "images" / "all"
        folder.mkdir(parents=True)
        for number in range(count):
            image = large[number % len(large)]
            x, y = int(rng.integers(image.width - 499)), int(rng.integers(image.height - 374))
            image.crop((x, y, x + 500, y + 375)).save(folder / f"{number:04d}.jpg", quality=90)
        shutil.move(str(folder.parent), target)
    return target


def crops(index: DatasetIndex, batch: int, threads: int) -> CropStream:
    """The decoded random crops of one rank that loads everything."""
    config = DataConfig(num_threads=threads, crop_scale_min=SCALE_MIN)
    options = DecoderOptions.of(config, index, torch.device("cpu"))
    return CropStream(index, config, IMAGE_SIZE, whole(batch), options)


def whole(batch: int) -> Feed:
    """One rank that loads everything."""
    return Feed(Share(batch, batch, 1, 0, 1, 0, 1), SEED, torch.device("cpu"), torch.float32)


def images_per_second(next_batch: NextBatch, batch: int, batches: int, queued: int) -> float:
    for _ in range(queued):  # decoded while others were timed: not this round's work
        next_batch()
    start = time.perf_counter()
    for _ in range(batches):
        next_batch()
    return batch * batches / (time.perf_counter() - start)


class Speeds(dict[str, list[float]]):
    """Images a second of every contender, in each round."""

    def median(self) -> dict[str, float]:
        """By contender, over the rounds."""
        return {name: statistics.median(values) for name, values in self.items()}

    def spread(self) -> dict[str, tuple[float, float]]:
        """By contender, slowest and fastest round."""
        return {name: (min(values), max(values)) for name, values in self.items()}

    def ratio(self, name: str, other: str) -> float:
        """Of one contender over another, median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self[name], self[other], strict=True))


def in_rounds(names: Sequence[str], rounds: int, speed: Callable[[str], float]) -> Speeds:
    """Time every contender in each of ``rounds`` rounds, which begin with another one each time.

    One round more is made first and not counted: it fills caches, opens connections and starts threads.
    """
    names, speeds = list(names), Speeds({name: [] for name in names})
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_SECONDS)
            found = speed(name)
            if number:
                speeds[name].append(found)
    return speeds


def speed_table(
    title: str,
    over: str,
    speed: Mapping[str, float],
    spread: Mapping[str, tuple[float, float]],
    ratio: Mapping[str, float],
) -> Iterator[str]:
    """Speeds as text, a line a contender.

    Args:
        title: what was timed.
        over: title of the ratios.
        speed: images a second, by contender.
        spread: slowest and fastest round, by contender.
        ratio: of those contenders that have one.
    """
    width = len(over) + 2
    yield f"{title:32s}{'images/s':>10s}{'min':>8s}{'max':>8s}{over:>{width}s}"
    for name, median in speed.items():
        low, high = spread[name]
        quotient = f"{ratio[name]:.2f}" if name in ratio else ""
        yield f"{name:32s}{median:10.0f}{low:8.0f}{high:8.0f}{quotient:>{width}s}"


def add_round_flags(
    parser: argparse.ArgumentParser, contender: str, batch: int, rounds: int, threads: str = "decoding threads"
) -> None:
    """The flags that say how long is timed.

    Args:
        parser: gets them.
        contender: what has a turn in each round.
        batch: default of ``--batch``.
        rounds: default of ``--rounds``.
        threads: what ``--threads`` are.
    """
    parser.add_argument("--batch", type=int, default=batch, help="images of a batch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help=threads)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds; ratios are medians over them")
    parser.add_argument("--batches", type=int, default=16, help=f"batches that are timed of each {contender} a round")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check_round_flags(options: argparse.Namespace) -> None:
    """Refuse counts below 1."""
    for name in ("batch", "threads", "rounds", "batches"):
        require(getattr(options, name) >= 1, f"--{name} is {getattr(options, name)}; it must be at least 1.")
