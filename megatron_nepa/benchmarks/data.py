"""Times the pre-training input against torchvision's DataLoader and DALI's own reader, on the same images."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from megatron_nepa.benchmarks.input_rounds import (
    IMAGE_SIZE,
    SCALE_MIN,
    SEED,
    NextBatch,
    add_round_flags,
    check_round_flags,
    crops,
    images_per_second,
    in_rounds,
    sample_images,
    speed_table,
    whole,
)
from megatron_nepa.config import ConfigError, DataConfig, require
from megatron_nepa.data.decoding.pipelines import PREFETCH
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import open_image
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.loaders.pretraining import PretrainingLoader, build_index
from megatron_nepa.data.sampling.order import crop_boxes, flips, image_of_sample

IMAGENET_IMAGES = 1_281_167
H100_IMAGES_PER_SECOND = 3000  # what one H100 asks for on NEPA-B at 40 % of its bf16 peak

LOADER, TORCHVISION = "megatron_nepa, fp32", "torchvision, fp32"
CROPS, TORCHVISION_UINT8, DALI_READER = "megatron_nepa, uint8", "torchvision, uint8", "DALI's reader, uint8"
# each other contender and the one of ours with the same output: uint8 is what a GPU would be sent, fp32 is flipped and
# normalised
PAIRS = {TORCHVISION: LOADER, TORCHVISION_UINT8: CROPS, DALI_READER: CROPS}


@dataclass(frozen=True)
class DataReport:
    """What was measured.

    Attributes:
        images_per_second: by contender, median over the rounds.
        spread: by contender, slowest and fastest round.
        ratio: ours over each other contender with the same output, median of the rounds' ratios.
        plan_share: time of index look-up, order, boxes and flips over the time of a batch.
        startup_seconds: opening an index of ImageNet's size and planning its first batch.
        images_per_second_per_core: ours, decoded crops as a GPU would receive them (uint8).
        cores_per_h100: cores that feed one H100 without a GPU decoder.
    """

    images_per_second: dict[str, float]
    spread: dict[str, tuple[float, float]]
    ratio: dict[str, float]
    plan_share: float
    startup_seconds: float
    images_per_second_per_core: float
    cores_per_h100: float


def benchmark(folder: Path, batch: int, threads: int, rounds: int, batches: int) -> DataReport:
    """Time every contender in ``rounds`` interleaved rounds of ``batches`` batches of ``batch`` images."""
    index = build_index(DataConfig(path=str(folder)))
    assert index is not None
    loader, decoded = _loader(index, batch, threads), crops(index, batch, threads)
    contenders: dict[str, NextBatch] = {
        LOADER: lambda: next(loader).images,
        TORCHVISION: _torchvision(index, batch, threads, normalised=True),
        TORCHVISION_UINT8: _torchvision(index, batch, threads, normalised=False),
        CROPS: lambda: next(decoded)[0],
        DALI_READER: _dali_reader(folder, batch, threads),
    }
    queued = 2 * threads + PREFETCH
    speeds = in_rounds(
        list(contenders), rounds, lambda name: images_per_second(contenders[name], batch, batches, queued)
    )
    loader.close()
    decoded.close()
    median = speeds.median()
    per_core = median[CROPS] / threads
    return DataReport(
        images_per_second=median,
        spread=speeds.spread(),
        ratio={other: speeds.ratio(own, other) for other, own in PAIRS.items()},
        plan_share=_plan_seconds(index, batch) * median[CROPS] / batch,
        startup_seconds=_startup_seconds(batch),
        images_per_second_per_core=per_core,
        cores_per_h100=H100_IMAGES_PER_SECOND / per_core,
    )


def _loader(index: DatasetIndex, batch: int, threads: int) -> PretrainingLoader:
    config = DataConfig(num_threads=threads, crop_scale_min=SCALE_MIN, horizontal_flip=True)
    return PretrainingLoader(index, config, IMAGE_SIZE, whole(batch))


def _dali_reader(folder: Path, batch: int, threads: int) -> NextBatch:
    """DALI's file reader and random crop, with its default settings."""
    pipeline = Pipeline(batch, threads, None, seed=SEED, prefetch_queue_depth=PREFETCH)
    with pipeline:
        encoded, _ = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        image = fn.decoders.image_random_crop(encoded, random_area=[SCALE_MIN, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        image = fn.resize(image, size=[IMAGE_SIZE, IMAGE_SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]))
    pipeline.build()

    def next_batch() -> Tensor:
        (output,) = pipeline.run()
        images: Tensor = torch.from_dlpack(output.as_tensor())
        return images

    return next_batch


class _Folder(torch.utils.data.Dataset[Tensor]):
    """Images of an index through PIL and torchvision, as the authors' release loads them."""

    def __init__(self, index: DatasetIndex, normalised: bool) -> None:
        try:
            from torchvision import transforms
        except ImportError as error:
            raise ConfigError("the data benchmark compares with torchvision: pip install torchvision.") from error
        self._paths = [index.where(i) for i in range(len(index))]
        crop = transforms.RandomResizedCrop(IMAGE_SIZE, (SCALE_MIN, 1.0))
        flip, normalise = transforms.RandomHorizontalFlip(), transforms.Normalize([0.5] * 3, [0.5] * 3)
        after = [flip, transforms.ToTensor(), normalise] if normalised else [transforms.PILToTensor()]
        self._transform = transforms.Compose([crop, *after])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Tensor:
        with open_image(self._paths[i]) as image:
            transformed: Tensor = self._transform(image.convert("RGB"))
        return transformed


def _torchvision(index: DatasetIndex, batch: int, threads: int, normalised: bool) -> NextBatch:
    dataset = _Folder(index, normalised)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    batches = iter(torch.utils.data.DataLoader(dataset, batch, sampler=sampler, num_workers=threads))
    return lambda: next(batches)


def _plan_seconds(index: DatasetIndex, batch: int) -> float:
    """Index look-up, order, boxes and flips of one batch."""
    times = []
    for number in range(20):
        samples = np.arange(number * batch, (number + 1) * batch)
        start = time.perf_counter()
        images = image_of_sample(SEED, samples, len(index))
        crop_boxes(SEED, samples, index.width[images], index.height[images], SCALE_MIN)
        flips(SEED, samples)
        for image in images.tolist():
            index.names[image]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _startup_seconds(batch: int) -> float:
    """Open an index of ImageNet's size and plan its first batch."""
    with tempfile.TemporaryDirectory() as folder:
        names = PackedNames.pack(f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(IMAGENET_IMAGES))
        sizes = np.full(IMAGENET_IMAGES, 500, np.int32)
        label = np.arange(IMAGENET_IMAGES, dtype=np.int32) // 1300
        save_index(DatasetIndex(Path(folder), names, sizes, sizes, label), Path(folder) / "index")
        start = time.perf_counter()
        _plan_seconds(load_index(Path(folder) / "index"), batch)
        return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tools/benchmark.py data``."""
    parser.add_argument("--data", help="ImageFolder tree to read; none takes 500x375 cuts of the built-in photographs")
    add_round_flags(parser, "contender", batch=32, rounds=9, threads="cores, decoding threads, DataLoader workers")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    check_round_flags(options)
    cores = sorted(os.sched_getaffinity(0))
    require(options.threads <= len(cores), f"--threads {options.threads} is more than the {len(cores)} cores at hand.")
    os.sched_setaffinity(0, cores[: options.threads])  # a contender that starts more threads gets no more cores
    folder = sample_images() if options.data is None else Path(options.data)
    require(options.data is None or (options.data and folder.is_dir()), f"--data {options.data!r} is not a folder.")
    report = benchmark(folder, options.batch, options.threads, options.rounds, options.batches)
    if options.json:
        print(json.dumps(asdict(report) | {"machine": platform.processor() or platform.machine()}))
        return
    for line in lines(report, options.threads):
        print(line)


def lines(report: DataReport, threads: int) -> Iterator[str]:
    """The report as text."""
    title = f"random crops of 224, {threads} threads"
    yield from speed_table(title, "ours over it", report.images_per_second, report.spread, report.ratio)
    yield f"index look-up and order: {report.plan_share:.2%} of a batch"
    yield f"start-up on an index of {IMAGENET_IMAGES:,} images: {report.startup_seconds:.2f} s"
    yield (
        f"{report.images_per_second_per_core:.0f} images/s a core: decoding on the CPU, one H100 at "
        f"{H100_IMAGES_PER_SECOND} images/s needs {math.ceil(report.cores_per_h100)} cores"
    )
