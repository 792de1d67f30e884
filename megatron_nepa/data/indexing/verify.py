"""Checks listed images in worker processes, so that an image that crashes the decoder costs itself and nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import InaccessibleImageError, UnreadableImageError
from megatron_nepa.data.index.mask_file import mask_size, mask_values
from megatron_nepa.data.index.storage import HEADER_BYTES, ImageStore, read_mask
from megatron_nepa.data.workers import SPAWN, worker_pool

Verify = Literal["header", "full"]


@dataclass(frozen=True)
class Chunk:
    """Some images of one unit of a set."""

    unit: int
    rows: npt.NDArray[np.int64]  # of the unit, one behind the other
    images: DatasetIndex


@dataclass
class Checked:
    """What was found about a chunk."""

    rows: npt.NDArray[np.int64]  # of the unit
    width: npt.NDArray[np.int32]  # 0 where the image cannot be used
    height: npt.NDArray[np.int32]
    reasons: dict[int, str]  # row -> why it cannot be used


def check_images(chunks: Iterator[Chunk], verify: Verify, device: str, workers: int) -> Iterator[tuple[Chunk, Checked]]:
    """Check images, yielding each chunk as it is done, in any order.

    Args:
        chunks: a few hundred images each; the next ones are asked for as workers become free.
        verify: "header" parses headers, "full" decodes every pixel with the decoder that training uses.
        device: "cpu" or "cuda", where "full" decodes.
        workers: processes.

    Raises:
        ConfigError: the system does not give the bytes of an image or mask.
    """
    chunk = next(chunks, None)
    while chunk is not None:
        suspects: list[Chunk] = []
        with worker_pool(workers) as pool:
            running: dict[Future[Checked], Chunk] = {}
            while running or (chunk is not None and not suspects):
                while chunk is not None and not suspects and len(running) < 2 * workers:
                    running[pool.submit(_check, chunk.images, chunk.rows, verify, device)] = chunk
                    chunk = next(chunks, None)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done = running.pop(future)
                    try:
                        yield done, future.result()
                    except BrokenProcessPool:  # a worker died, and with it every chunk that was under way
                        suspects.append(done)
        for suspect in suspects:
            yield suspect, _corner(suspect, verify, device)


def _corner(chunk: Chunk, verify: Verify, device: str) -> Checked:
    """Check a chunk in a process of its own, again without the image under way each time that it dies."""
    fatal: list[int] = []
    while True:
        left = ~np.isin(chunk.rows, fatal)
        rest, images = chunk.rows[left], chunk.images.select(np.flatnonzero(left))
        under_way = SPAWN.Value("q", -1, lock=False)
        try:
            with worker_pool(1, _report_to, under_way) as pool:
                checked = pool.submit(_check, images, rest, verify, device).result()
        except BrokenProcessPool:
            if under_way.value < 0:  # it did not come as far as an image
                raise ConfigError(
                    "a process that checks images ends before it comes to one (out of memory?): ask for fewer with "
                    "--workers."
                ) from None
            fatal.append(under_way.value)
            continue
        width, height = np.zeros(len(chunk.rows), np.int32), np.zeros(len(chunk.rows), np.int32)
        width[left], height[left] = checked.width, checked.height
        return Checked(chunk.rows, width, height, checked.reasons | dict.fromkeys(fatal, "crashes the decoder"))


_under_way: ctypes.c_longlong | None = None  # in a worker of _corner: the row that it is checking


def _report_to(under_way: ctypes.c_longlong) -> None:
    global _under_way
    _under_way = under_way


def mark(row: int) -> None:
    """In a worker: say which row is checked next, for the parent to know should this process die of it."""
    if _under_way is not None:
        _under_way.value = row


def _check(images: DatasetIndex, rows: npt.NDArray[np.int64], verify: Verify, device: str) -> Checked:
    """In a worker: check every image of a chunk."""
    store = ImageStore(images)
    width, height = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    reasons: dict[int, str] = {}
    with store.together(range(len(rows)), HEADER_BYTES if verify == "header" else None):
        for i, row in enumerate(rows.tolist()):
            mark(row)
            try:
                size = store.image_size(i)
                if len(images.masks):
                    _check_mask(images, i, size, verify)
                if verify == "full":
                    # imported where it is needed: parsing headers needs neither torch nor DALI, and starts in no time
                    from megatron_nepa.data.decoding.full_decode import full_decode

                    full_decode(store.read(i), size, device)
                width[i], height[i] = size
            except InaccessibleImageError as error:
                raise ConfigError(f"{images.where(i)} cannot be read: {error}.") from error
            except UnreadableImageError as error:
                reasons[row] = str(error)
    return Checked(rows, width, height, reasons)


def _check_mask(images: DatasetIndex, i: int, size: tuple[int, int], verify: Verify) -> None:
    name = images.masks[i]
    try:
        content = read_mask(images, i)
        mask = mask_size(content) if verify == "header" else mask_values(content).shape[::-1]
    except UnreadableImageError as error:
        raise type(error)(f"its mask {name}: {error}") from error
    if mask != size:
        raise UnreadableImageError(f"is {size[0]} x {size[1]}, its mask {name} {mask[0]} x {mask[1]}")
