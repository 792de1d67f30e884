"""Builds the index of a data set of any size: list its units, check their images, write the rows one behind the other.

Units (shards, class folders) are listed and images are checked in parallel, and what is finished is kept in parts on
disk, so that no process holds more than a unit, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.index_file import load_index
from megatron_nepa.data.index.index_writer import IndexWriter, root_in_index
from megatron_nepa.data.index.listing import Numbering, Source
from megatron_nepa.data.indexing.lock import claimed
from megatron_nepa.data.indexing.parts import Parts
from megatron_nepa.data.indexing.verify import Verify, check_images
from megatron_nepa.data.workers import worker_pool
from megatron_nepa.terminal import counted

_MOST_CONTEXTS = 4  # processes on one GPU: each holds a CUDA context and decoder buffers of hundreds of MB
_CHUNK = 1024  # images of one task: seconds of decoding, so that little is lost when a run is stopped


def build_and_save_index(
    source: Source,
    out: str | Path,
    verify: Verify = "header",
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> DatasetIndex:
    """List a data set, verify every image of it and write the index of those that can be used.

    What is done is kept in ``OUT.partial`` until the index is complete: the same call continues after an interruption.

    Args:
        source: from :func:`megatron_nepa.data.index.sources.open_source`.
        out: folder of the index, which must not exist.
        verify: "header" parses every header, "full" decodes every pixel with the decoder that training uses.
        device: "cpu" or "cuda", where "full" decodes.
        workers: processes; None takes one a core, and at most 4 where each decodes on a GPU.
        progress: show progress bars.

    Returns:
        The index, opened, whose ``quarantine`` names what was left out and why.

    Raises:
        ConfigError: ``out`` exists, another process is writing it, the set cannot be listed, an image's bytes cannot be
            had, or no image can be used.
    """
    if device == "cuda":
        import torch  # here, since reading headers does without it

        require(torch.cuda.is_available(), "there is no CUDA device to decode on: leave out --device cuda.")
    target = Path(out)
    require(not target.exists(), f"{target} exists already: remove it, or choose another name for the index.")
    partial = target.with_name(target.name + ".partial")
    mismatch = f"{partial} was begun with other images or another --verify: remove it to start afresh."
    with claimed(partial / "listing.json", _identity(source, verify), mismatch):
        parts = Parts(partial, source.root, _CHUNK)
        _list_units(source, parts, workers or os.cpu_count() or 1, progress)
        units = range(len(source.units))
        numbering = source.number(parts.listing(unit).facts for unit in units)
        count = sum(len(parts.listing(unit)) for unit in units)
        done = sum(len(rows) for unit in units for rows in parts.chunks(unit) if parts.is_checked(unit, rows))
        unchecked = (chunk for unit in units for chunk in parts.unchecked(unit))
        with tqdm(total=count, initial=done, unit=" images", disable=not progress) as bar:
            for chunk, checked in check_images(unchecked, verify, device, workers or _processes(verify, device)):
                parts.save_checked(chunk.unit, checked)
                bar.update(len(chunk.rows))
        _write(source, parts, numbering, target)
        shutil.rmtree(partial)
    return replace(load_index(target), notes=numbering.notes)


def _identity(source: Source, verify: Verify) -> dict[str, Any]:
    """What the finished parts belong to."""
    return {"listing": source.identity(), "verify": verify, "chunk": _CHUNK}


def _list_units(source: Source, parts: Parts, workers: int, progress: bool) -> None:
    """List, in parallel, the units that were not listed yet."""
    units = range(len(source.units))
    missing = [unit for unit in units if not parts.is_listed(source, unit)]
    with tqdm(
        total=len(units), initial=len(units) - len(missing), unit=f" {source.unit}",
        disable=not progress or len(units) == 1,
    ) as bar:  # fmt: skip
        if min(len(missing), workers) <= 1:
            for unit in missing:
                parts.save_listing(unit, source.list(unit))
                bar.update()
            return
        waiting, running = iter(missing), deque[Future[None]]()
        with worker_pool(min(workers, len(missing)), _serve, source, parts) as pool:
            try:
                while True:
                    for unit in islice(waiting, 4 * workers - len(running)):
                        running.append(pool.submit(_list_in_worker, unit))
                    if not running:
                        return
                    running.popleft().result()  # in their order: of several that fail the first is named
                    bar.update()
            except BrokenProcessPool:
                raise ConfigError(
                    f"a process that lists {source.unit} ended (out of memory?): ask for fewer with --workers."
                ) from None
            finally:
                for task in running:
                    task.cancel()


_listed_by_worker: tuple[Source, Parts] | None = None  # in a worker of _list_units


def _serve(source: Source, parts: Parts) -> None:
    global _listed_by_worker
    _listed_by_worker = source, parts


def _list_in_worker(unit: int) -> None:
    assert _listed_by_worker is not None
    source, parts = _listed_by_worker
    parts.save_listing(unit, source.list(unit))


def _write(source: Source, parts: Parts, numbering: Numbering, target: Path) -> None:
    """Write the index of the images that passed, in the order of the units."""
    folder = parts.folder / "index"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped while it wrote
    writer = IndexWriter(folder)
    units = range(len(source.units))
    for unit in units:
        writer.leave_out(parts.listing(unit).quarantine)
    for unit in units:
        listing = parts.listing(unit)
        facts = listing.facts
        first_shard = writer.add_shards(listing.slice(0, 0))
        for rows in parts.chunks(unit):
            checked = parts.checked(unit, rows)
            images = numbering.numbered(listing.slice(rows.start, rows.stop), facts)
            bad = sorted(checked.reasons.items())
            writer.leave_out((images.names[row - rows.start], reason) for row, reason in bad)
            images = replace(images, width=checked.width, height=checked.height)
            writer.append(images.select(np.flatnonzero(checked.width)) if bad else images, first_shard)
    if not len(writer):
        name, reason = writer.first_left_out or ("", "there is none")
        count = sum(len(parts.listing(unit)) for unit in units)
        raise ConfigError(
            f"none of the {counted(count, 'image')} of {source.root} can be used; the first, {name}: {reason}."
        )
    writer.finish(root_in_index(source.root, target), numbering.classes)
    folder.rename(target)


def _processes(verify: Verify, device: str) -> int:
    cores = os.cpu_count() or 1
    return min(cores, _MOST_CONTEXTS) if verify == "full" and device == "cuda" else cores
