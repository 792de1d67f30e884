"""Times the pre-training input from shards behind a local web server beside the same shards here."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_nepa.benchmarks.input_rounds import (
    add_round_flags,
    check_round_flags,
    crops,
    images_per_second,
    in_rounds,
    sample_images,
    speed_table,
)
from megatron_nepa.config import require
from megatron_nepa.data.decoding.pipelines import PREFETCH
from megatron_nepa.data.decoding.sample_reader import reading_ahead
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards

SHARD_SIZE = 100
LOCAL = "tar shards here"


@dataclass(frozen=True)
class RemoteReport:
    """What was measured.

    Attributes:
        images_per_second: by source, median over the rounds.
        spread: by source, slowest and fastest round.
        ratio: of each remote source over the shards here, median of the rounds' ratios.
        mean_bytes: of an image.
    """

    images_per_second: dict[str, float]
    spread: dict[str, tuple[float, float]]
    ratio: dict[str, float]
    mean_bytes: float


def benchmark(folder: Path, batch: int, threads: int, rounds: int, batches: int, delays: list[float]) -> RemoteReport:
    """Time each source in ``rounds`` interleaved rounds of ``batches`` batches of ``batch`` images.

    Args:
        folder: images, which are packed into shards.
        batch: images of a batch.
        threads: decoding threads.
        rounds: in each of which every source is timed once.
        batches: that are timed of each source in a round.
        delays: milliseconds that a server waits before each answer; a server for each.
    """
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        write_shards(scan_folder(folder), shards, SHARD_SIZE, progress=False)
        indexes = {LOCAL: _indexed(str(shards), Path(scratch) / "local", threads)}
        with _servers(shards, delays) as urls:
            for number, (delay, url) in enumerate(zip(delays, urls, strict=True)):
                indexes[f"behind {delay:g} ms"] = _indexed(url, Path(scratch) / f"remote{number}", threads)
            return _timed(indexes, batch, threads, rounds, batches)


def _indexed(source: str, path: Path, threads: int) -> DatasetIndex:
    return build_and_save_index(open_source(source), path, workers=threads, progress=False)


def _timed(indexes: dict[str, DatasetIndex], batch: int, threads: int, rounds: int, batches: int) -> RemoteReport:
    sources = {name: crops(index, batch, threads) for name, index in indexes.items()}

    def speed(name: str) -> float:
        ahead = PREFETCH + reading_ahead(indexes[name], threads, batch)[1] + 1
        return images_per_second(lambda: next(sources[name])[0], batch, batches, ahead)

    speeds = in_rounds(list(sources), rounds, speed)
    for stream in sources.values():
        stream.close()
    return RemoteReport(
        images_per_second=speeds.median(),
        spread=speeds.spread(),
        ratio={name: speeds.ratio(name, LOCAL) for name in sources if name != LOCAL},
        mean_bytes=float(indexes[LOCAL].size[:].mean()),
    )


@contextmanager
def _servers(folder: Path, delays: list[float]) -> Iterator[list[str]]:
    """Web servers of a folder, each in a process of its own, so that none takes this one's time."""
    context = multiprocessing.get_context("spawn")
    processes, urls = [], []
    try:
        for delay in delays:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(folder, delay / 1e3, theirs), daemon=True)
            process.start()
            processes.append(process)
            urls.append(f"http://127.0.0.1:{ours.recv()}")
        yield urls
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(folder: Path, delay: float, connection: Connection) -> None:
    """Serve byte ranges of the files of a folder until the process ends."""
    descriptors = {name: os.open(folder / name, os.O_RDONLY) for name in os.listdir(folder)}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 18
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(delay)
            name = self.path.strip("/")
            if not name:  # the folder
                self.reply(200, "".join(f'<a href="{name}">{name}</a>' for name in descriptors).encode(), "text/html")
            elif name not in descriptors:
                self.reply(404, b"")
            else:
                size = os.fstat(descriptors[name]).st_size
                first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
                count = min(int(last), size - 1) + 1 - int(first)
                head = self.command == "HEAD"
                content = b"" if head else os.pread(descriptors[name], count, int(first))
                self.reply(206 if "Range" in self.headers else 200, content, length=size if head else count)

        do_HEAD = do_GET

        def reply(
            self, status: int, content: bytes, kind: str = "application/x-tar", length: int | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer.request_queue_size = 256
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    connection.send(server.server_address[1])
    server.serve_forever()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tools/benchmark.py remote``."""
    parser.add_argument("--data", help="ImageFolder tree to pack; none takes 500x375 cuts of the built-in photographs")
    parser.add_argument("--delays", default="0,30", help="milliseconds before a server's answers, one server for each")
    add_round_flags(parser, "source", batch=64, rounds=7)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    check_round_flags(options)
    try:
        delays = [float(delay) for delay in options.delays.split(",")]
    except ValueError:
        delays = [-1.0]
    require(min(delays) >= 0, f"--delays {options.delays} are no milliseconds, such as 0,30.")
    require(options.data is None or Path(options.data).is_dir(), f"--data {options.data!r} is not a folder.")
    folder = sample_images() if options.data is None else Path(options.data)
    report = benchmark(folder, options.batch, options.threads, options.rounds, options.batches, delays)
    if options.json:
        print(json.dumps(asdict(report)))
        return
    for line in lines(report):
        print(line)


def lines(report: RemoteReport) -> Iterator[str]:
    """The report as text."""
    title = f"crops of images of {report.mean_bytes / 1e3:.0f} kB"
    yield from speed_table(title, "of here", report.images_per_second, report.spread, report.ratio)
