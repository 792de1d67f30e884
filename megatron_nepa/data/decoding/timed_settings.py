"""The decoder's settings that a run leaves open, timed at its start on its own images.

Threads decide no pixel. Which of a GPU's two decoders an image goes to may decide its rounding. So the share of the
hardware decoder is timed when a run begins, and is the same on all ranks; a run that continues keeps it, and a
deterministic run, which has no split between the two, does not time it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.remote.folder import SourceLostError
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.mixing import sample_order
from megatron_nepa.data.sampling.order import crop_boxes
from megatron_nepa.parallel.launcher import ranks_of_this_node

if TYPE_CHECKING:  # they bring DALI, which synthetic images do without
    from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch
    from megatron_nepa.data.decoding.pipelines import DecoderOptions

logger = logging.getLogger(__name__)

LOADS = (0.0, 0.12, 0.35, 0.65, 1.0)  # from the CUDA decoder alone to the hardware engine alone
THREADS = (1, 2, 4, 8, 16, 32, 64)
LOADS_THREADS = 8  # while loads are compared, where the node has as many cores a rank
ENOUGH = 0.95  # of the best rate: more threads than that takes are cores lost to others
MOST_IMAGES = 128  # of a batch that is timed
SECONDS = 0.2  # that each choice is timed for, and two batches at least

Rate = Callable[[int, float], float]  # images a second with so many threads and that load


@dataclass(frozen=True)
class Decoded:
    """What a task decodes while it trains.

    Attributes:
        index: the images.
        image_size: side S that crops are resized to.
        device: where they are decoded.
        scale_min: least share of an image's area in a crop; 1 decodes whole images.
    """

    index: DatasetIndex | Mixture
    image_size: int
    device: torch.device
    scale_min: float


def settle(
    config: DataConfig, decoded: Decoded | None, feed: Feed, group: dist.ProcessGroup, kept_load: float | None = None
) -> DataConfig:
    """``config`` with a number of threads and a load; every rank calls it.

    Args:
        config: of which what is None is timed.
        decoded: what; None where nothing is, and ``config`` stays as it is.
        feed: whose first micro-batch is decoded, again and again.
        group: gloo group of all ranks, which time at the same moment; the slowest rank's rates count.
        kept_load: of the run that this one continues.
    """
    if decoded is None:
        return config
    from megatron_nepa.data.decoding.pipelines import DecoderOptions

    on_gpu = decoded.device.type == "cuda"
    options = DecoderOptions.of(config, decoded.index, decoded.device)
    load: float | None = options.hw_decoder_load
    if on_gpu and config.hw_decoder_load is None and not torch.are_deterministic_algorithms_enabled():
        load = kept_load
    if load is not None and config.num_threads is not None:
        return replace(config, hw_decoder_load=load)

    def slowest(value: float) -> float:
        agreed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
        return float(agreed)

    batch = _first_batch(decoded, feed, options)

    def rate(threads: int, load: float) -> float:
        slowest(0.0)  # all begin together
        return slowest(_rate(batch, decoded, replace(options, num_threads=threads, hw_decoder_load=load)))

    cores = slowest(len(os.sched_getaffinity(0)) // ranks_of_this_node(os.environ))
    threads, load, rates = fastest(config.num_threads, load, int(cores), rate)
    if not any(rates.values()):
        threads, load = options.num_threads, options.hw_decoder_load
    tried = ", ".join(f"{t} and {each:g}: {found:.0f}" for (t, each), found in rates.items())
    logger.info("decoder: %d threads, hw_decoder_load %g; images/s of a rank with %s", threads, load, tried)
    return replace(config, num_threads=threads, hw_decoder_load=load)


def fastest(
    threads: int | None, load: float | None, cores: int, rate: Rate
) -> tuple[int, float, dict[tuple[int, float], float]]:
    """The fastest load, then the fewest threads that are about as fast as any; and the rates by both.

    Args:
        threads: None to choose.
        load: None to choose.
        cores: of a rank, which bound the threads.
        rate: measures.
    """
    rates: dict[tuple[int, float], float] = {}

    def timed(count: int, share: float) -> float:
        if (count, share) not in rates:
            rates[count, share] = rate(count, share)
        return rates[count, share]

    if load is None:
        count = threads or max(1, min(LOADS_THREADS, cores))
        load = max(LOADS, key=lambda share: timed(count, share))
    if threads is None:
        counts = [count for count in THREADS if count <= max(1, cores)]
        best = max(timed(count, load) for count in counts)
        threads = next(count for count in counts if timed(count, load) >= ENOUGH * best)
    return threads, load, rates


def _first_batch(decoded: Decoded, feed: Feed, options: DecoderOptions) -> EncodedBatch:
    """The crops of the rank's first micro-batch that can be decoded."""
    from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch, undecodable_slots
    from megatron_nepa.data.decoding.encoded_images import encoded_images

    index, store = decoded.index, encoded_images(decoded.index)
    samples = feed.share.local_samples(feed.share.first_micro_batch(feed.consumed_samples))[:MOST_IMAGES]
    images = sample_order(index, feed.seed, feed.order).images(samples)
    boxes = crop_boxes(feed.seed, samples, index.width[images], index.height[images], decoded.scale_min)
    files, readable = [], []
    try:
        with store.together(images.tolist()):
            for slot, image in enumerate(images.tolist()):
                try:
                    files.append(store.read(image))
                    readable.append(slot)
                except UnreadableImageError:  # the loader names it
                    continue
    except SourceLostError:  # likewise, together with the other ranks
        pass
    store.close()
    batch = EncodedBatch(files, boxes[readable, :2].copy(), boxes[readable, 2:].copy())
    if not files:
        return batch
    good = np.setdiff1d(np.arange(len(files)), undecodable_slots(batch, options))
    return EncodedBatch([files[slot] for slot in good], batch.start[good], batch.shape[good])


def _rate(batch: EncodedBatch, decoded: Decoded, options: DecoderOptions) -> float:
    """Images a second; 0 where they do not decode."""
    from megatron_nepa.data.decoding.crop_pipeline import crop_pipeline
    from megatron_nepa.data.decoding.pipelines import PREFETCH

    count, batches = len(batch.encoded), 0
    if not count:
        return 0.0
    try:
        pipeline = crop_pipeline(lambda number: batch, count, decoded.image_size, options)
        for _ in range(PREFETCH + 2):  # what was decoded ahead is not timed
            pipeline.next_images()
        _wait_for(decoded.device)
        start = time.perf_counter()
        while batches < 2 or time.perf_counter() - start < SECONDS:
            pipeline.next_images()
            _wait_for(decoded.device)
            batches += 1
        seconds = time.perf_counter() - start
        pipeline.close()
    except RuntimeError as error:
        logger.warning("decoder: load %g does not run here: %s", options.hw_decoder_load, str(error).splitlines()[0])
        return 0.0
    return batches * count / seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
