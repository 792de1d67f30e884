"""What each sample shows, read ahead of the decoder, and what happens when an image is bad.

A sample whose image cannot be read or decoded shows the first image further on in its epoch's permutation that can, of
a mixture in that of its own source, with the crop that (seed, k) draws for that image's size. This too is a pure
function of (seed, k) and the files: which rank meets the sample, when, and what it met before play no part. The list of
bad images is a record, never an input.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from megatron_nepa.config import ConfigError, DataConfig, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.index_file import let_go
from megatron_nepa.data.index.mixture import Mixture, sets_of
from megatron_nepa.data.remote.files import CONNECTIONS
from megatron_nepa.data.sampling.order import IntArray, SampleOrder

_ALWAYS_ALLOWED = 10  # bad images, before the allowed share of few images says anything

_REMOTE_AHEAD, _REMOTE_BYTES = 4 * CONNECTIONS, 2**28  # images, and bytes, that are asked for ahead of their batch
_SIZES_LOOKED_AT = 100_000

_SAID = 10  # bad images that are also named on the terminal; the log has all

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Reads the items of a batch in threads, and those of the next ones while this one is used.

    Args:
        items_of: the items of a batch, int64 [n]; an empty array ends the reading ahead.
        read: called in the threads with a part of a batch's items.
        threads: how many.
        depth: batches that are read meanwhile.
    """

    def __init__(
        self, items_of: Callable[[int], IntArray], read: Callable[[IntArray], T], threads: int, depth: int = 1
    ) -> None:
        self._items_of, self._read, self._threads, self._depth = items_of, read, threads, depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-reader")
        self._ahead: dict[int, list[Future[T]]] = {}

    def __call__(self, batch: int) -> list[T]:
        """What ``read`` gave for the parts of ``batch``, in order; its exceptions are raised here."""
        tasks = self._ahead.pop(batch, None) or self._submit(batch)
        following = range(batch + 1, batch + 1 + self._depth)
        self._ahead = {later: self._ahead.get(later) or self._submit(later) for later in following}
        return [task.result() for task in tasks]

    def forget(self, batch: int) -> None:
        """Read ``batch`` anew when it is asked for, and keep what was read ahead of the others."""
        self._ahead.pop(batch, None)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, batch: int) -> list[Future[T]]:
        # one task a thread rather than one an item: a task's overhead is near that of reading a cached file
        parts = np.array_split(self._items_of(batch), self._threads)
        return [self._pool.submit(self._read, part) for part in parts if len(part)]


def reading_ahead(index: DatasetIndex | Mixture, threads: int, batch: int) -> tuple[int, int]:
    """Threads that read, and batches that they read ahead of the one in use.

    A thread waits for the answer of a remote source, where it is busy with a local file: it takes as many threads as
    requests are to be under way, and enough batches for them to work on, within a bound of memory.

    Args:
        index: the images.
        threads: decoding threads, which is what local files take.
        batch: images of a batch.
    """
    if not index.is_remote:
        return threads, 1
    sizes = [float(np.mean(one.size[:_SIZES_LOOKED_AT])) for one in sets_of(index) if one.is_remote]
    mean = max(1.0, *sizes)
    batches = min(-(-_REMOTE_AHEAD // max(batch, 1)), int(_REMOTE_BYTES / (mean * max(batch, 1))))
    return CONNECTIONS, max(1, batches)


class SampleReader(Generic[T]):
    """What the samples of a micro-batch show, with other images in place of those that cannot be used.

    Args:
        index: the images.
        config: its on_bad_image and max_bad_share.
        threads: that read.
        order: which of them each sample shows.
        samples_of: sample numbers of a micro-batch, int64 [n].
        read: called in threads with a sample and the image that it is to show; raises UnreadableImageError.
        bad_image_log: JSON-lines file that bad images are appended to.
        together: gives a context in which a thread reads some images, which may be neighbours.
    """

    def __init__(
        self,
        index: DatasetIndex | Mixture,
        config: DataConfig,
        threads: int,
        order: SampleOrder,
        samples_of: Callable[[int], IntArray],
        read: Callable[[int, int], T],
        bad_image_log: Path | None = None,
        together: Callable[[list[int]], AbstractContextManager[None]] = lambda images: nullcontext(),
    ) -> None:
        self._index, self._config, self._order = index, config, order
        self._samples_of, self._read, self._together, self._log = samples_of, read, together, bad_image_log
        threads, depth = reading_ahead(index, threads, len(samples_of(0)))
        self._read_ahead = ReadAhead(samples_of, self._read_samples, threads, depth)
        self._undecodable: dict[int, set[int]] = {}  # sample -> places further on that are known not to decode
        self._bad: set[tuple[int, int]] = set()  # (sample, image)
        self._bad_images: dict[int, set[int]] = defaultdict(set)  # source -> its images
        self._newest = -1  # the last micro-batch that was asked for
        self._num_samples: Counter[int] = Counter()  # of each source until there

    def __call__(self, micro_batch: int) -> tuple[list[T], IntArray]:
        """What ``read`` gave for each sample of ``micro_batch``, and the images shown, int64 [n].

        The next micro-batch is read meanwhile.

        Raises:
            ConfigError: a bad image under on_bad_image "fail", or too many.
        """
        parts = self._read_ahead(micro_batch)
        for index in sets_of(self._index):
            let_go(index)  # the next micro-batch's rows are others
        images = np.array([image for _, shown in parts for image in shown])
        if micro_batch > self._newest:  # it is asked for again where the decoder refuses an image of it
            self._newest = micro_batch
            self._num_samples.update(self._order.source(self._samples_of(micro_batch)).tolist())
        return [item for items, _ in parts for item in items], images

    @property
    def num_bad_images(self) -> int:
        """(sample, image) pairs that were found bad."""
        return len(self._bad)

    def close(self) -> None:
        """End the reading threads."""
        self._read_ahead.close()

    def _read_samples(self, samples: IntArray) -> tuple[list[T], list[int]]:
        images = self._order.images(samples).tolist()
        with self._together(images):
            return self._read_images(samples, images)

    def _read_images(self, samples: IntArray, images: list[int]) -> tuple[list[T], list[int]]:
        items = []
        for i, sample in enumerate(samples.tolist()):
            skip = 0
            while True:
                if skip not in self._undecodable.get(sample, ()):
                    try:
                        items.append(self._read(sample, images[i]))
                        break
                    except UnreadableImageError as reason:
                        self._record(sample, images[i], f"{self._index.where(images[i])}: {reason}")
                skip += 1
                choices = self._order.choices(self._source(sample))
                require(
                    skip < choices,
                    f"none of the {choices} images{self._of(sample)} can be read or decoded: see whether their disk is "
                    "still there.",
                )
                images[i] = self._image(sample, skip)
        return items, images

    def _image(self, sample: int, skip: int) -> int:
        return int(self._order.images(np.array([sample]), skip)[0])

    def _source(self, sample: int) -> int:
        return int(self._order.source(np.array([sample]))[0])

    def _of(self, sample: int) -> str:
        """Which source's images a sample may show, for messages."""
        index = self._index
        return f" of {index.sources[self._source(sample)].name}" if isinstance(index, Mixture) else ""

    def reject(self, micro_batch: int, slots: list[int], reason: str) -> None:
        """Take the images in ``slots`` of ``micro_batch`` for undecodable: the next call gives others in their place.

        Raises:
            ConfigError: under on_bad_image "fail", or when there are too many.
        """
        self._read_ahead.forget(micro_batch)
        samples = self._samples_of(micro_batch)
        for slot in slots:
            sample = int(samples[slot])
            failed = self._undecodable.setdefault(sample, set())
            skip = 0
            while skip in failed or (sample, self._image(sample, skip)) in self._bad:
                skip += 1
            failed.add(skip)
            image = self._image(sample, skip)
            self._record(sample, image, f"{self._index.where(image)}: {reason}")

    def _record(self, sample: int, image: int, reason: str) -> None:
        if (sample, image) in self._bad:
            return
        if self._config.on_bad_image == "fail":
            raise ConfigError(f"sample {sample} cannot be decoded: {reason} (data.on_bad_image is fail).")
        self._bad.add((sample, image))
        source = self._source(sample)
        self._bad_images[source].add(image)  # counted once, however often it comes round in many epochs
        bad, read = len(self._bad_images[source]), min(self._num_samples[source], self._order.choices(source))
        if bad > _ALWAYS_ALLOWED + self._config.max_bad_share * read:
            raise ConfigError(
                f"{bad} of the first {read} images{self._of(sample)} of this rank cannot be used, more than "
                f"data.max_bad_share {self._config.max_bad_share} (and {_ALWAYS_ALLOWED}); the last is {reason}."
            )
        if len(self._bad) <= _SAID:
            print(f"sample {sample} shows another image: {reason}", file=sys.stderr, flush=True)
        if self._log is not None:
            row: dict[str, int | str] = {"sample": sample}
            if isinstance(self._index, Mixture):
                number, image = self._index.locate(image)
                row["source"] = self._index.sources[number].name
            row |= {"image": image, "reason": reason}
            # one short write in append mode: ranks do not cut each other's lines. A full disk, or a folder that is
            # gone, costs the record, as it does the metrics
            with contextlib.suppress(OSError), open(self._log, "a") as file:
                file.write(json.dumps(row) + "\n")
