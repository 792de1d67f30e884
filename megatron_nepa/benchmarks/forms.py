"""Times the pre-training input over the same images in tar shards, in Arrow and in parquet files, and as files.

Images are decoded as a run decodes them, on the CPU, so this is what a form costs beside the decoding. Forms take turns
in one process, and ratios are of neighbouring turns: of wall time, and of the CPU time that the process took, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_nepa.benchmarks.input_rounds import (
    SETTLE_SECONDS,
    add_round_flags,
    check_round_flags,
    crops,
    sample_images,
)
from megatron_nepa.data.decoding.crop_stream import CropStream
from megatron_nepa.data.decoding.pipelines import PREFETCH
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import read_sizes, scan_folder
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.index.table_values import require_pyarrow
from megatron_nepa.data.indexing.write_shards import write_shards

TAR = "tar shards"
_ROWS = 100  # images of a shard, of a record batch and of a row group


@dataclass(frozen=True)
class FormsReport:
    """What was measured.

    Attributes:
        images_per_second: by form, median over the rounds.
        ratio: each other form's over that of tar shards, median of the rounds' ratios.
        cpu_ratio: likewise of images a second of CPU time.
    """

    images_per_second: dict[str, float]
    ratio: dict[str, float]
    cpu_ratio: dict[str, float]


def benchmark(folder: Path, batch: int, threads: int, rounds: int, batches: int) -> FormsReport:
    """Time every form in ``rounds`` rounds of ``batches`` batches of ``batch`` images."""
    with tempfile.TemporaryDirectory() as beside:
        streams = {
            name: crops(index, batch, threads) for name, index in forms(scan_folder(folder), Path(beside)).items()
        }
        first = {name: next(stream)[0].clone() for name, stream in streams.items()}
        assert all(torch.equal(pixels, first[TAR]) for pixels in first.values())
        turns: dict[str, list[_Turn]] = {name: [] for name in streams}
        for number in range(rounds + 1):
            for name in list(streams)[:: 1 if number % 2 else -1]:
                time.sleep(SETTLE_SECONDS)
                turn = _take_turn(streams[name], batches, queued=2 * threads + PREFETCH)
                if number:  # the first round fills caches and starts threads
                    turns[name].append(turn)
        for stream in streams.values():
            stream.close()
    others = [name for name in turns if name != TAR]

    def ratio(seconds: Callable[[_Turn], float], name: str) -> float:
        return statistics.median(seconds(a) / seconds(b) for a, b in zip(turns[TAR], turns[name], strict=True))

    return FormsReport(
        {name: batch * batches / statistics.median(turn.wall for turn in taken) for name, taken in turns.items()},
        {name: ratio(lambda turn: turn.wall, name) for name in others},
        {name: ratio(lambda turn: turn.cpu, name) for name in others},
    )


class _Turn(NamedTuple):
    """Seconds of some batches."""

    wall: float
    cpu: float


def _take_turn(stream: CropStream, batches: int, queued: int) -> _Turn:
    for _ in range(queued):  # decoded while others had their turn
        next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(stream)
    return _Turn(time.perf_counter() - wall, time.process_time() - cpu)


def forms(index: DatasetIndex, folder: Path) -> dict[str, DatasetIndex]:
    """The images of an index in every form, each by an index of its own in the same order."""
    require_pyarrow(folder)
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_shards(index, folder / "shards", _ROWS, progress=False)
    images = [
        {"bytes": (index.folder / name).read_bytes(), "path": os.path.basename(name)} for name in index.names
    ]  # as datasets lays them out
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(np.asarray(index.label))})
    for name in ("arrow", "parquet"):
        (folder / name).mkdir()
    with pa.OSFile(str(folder / "arrow/data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS)
    pq.write_table(
        table, folder / "parquet/data.parquet", row_group_size=_ROWS, compression="none", use_dictionary=False
    )
    places = {TAR: "shards", "Arrow": "arrow", "parquet": "parquet"}
    return {"files": index, **{name: read_sizes(list_source(folder / place)) for name, place in places.items()}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tools/benchmark.py forms``."""
    add_round_flags(parser, "form", batch=32, rounds=15)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    check_round_flags(options)
    report = benchmark(sample_images(), options.batch, options.threads, options.rounds, options.batches)
    if options.json:
        print(json.dumps(asdict(report)))
        return
    for line in lines(report):
        print(line)


def lines(report: FormsReport) -> Iterator[str]:
    """The report as text."""
    yield f"{'':12s}{'images/s':>10s}{'over tar':>10s}{'by CPU time':>13s}"
    for name, speed in report.images_per_second.items():
        yield f"{name:12s}{speed:10.0f}{report.ratio.get(name, 1.0):10.3f}{report.cpu_ratio.get(name, 1.0):13.3f}"
