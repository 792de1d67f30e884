"""Builds the index of a large data set: list, verify in parallel, resume where a run was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.index_file import save_index
from megatron_nepa.data.indexing.lock import claimed
from megatron_nepa.data.indexing.verify import Checked, Verify, check_images
from megatron_nepa.terminal import counted

_MOST_CONTEXTS = 4  # processes on one GPU: each holds a CUDA context and decoder buffers of hundreds of MB
_CHUNK = 256  # images of one task: seconds of decoding, so that little is lost when a run is stopped


def build_and_save_index(
    listing: DatasetIndex,
    out: str | Path,
    verify: Verify = "header",
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> DatasetIndex:
    """Verify every image of a listing and write the index of those that can be used.

    What is done is kept in ``OUT.partial`` until the index is complete: the same call continues after an interruption.

    Args:
        listing: from :func:`megatron_nepa.data.index.sources.list_source`.
        out: folder of the index, which must not exist.
        verify: "header" parses every header, "full" decodes every pixel with the decoder that training uses.
        device: "cpu" or "cuda", where "full" decodes.
        workers: processes; None takes one a core, and at most 4 where each decodes on a GPU.
        progress: show a progress bar.

    Returns:
        The index, whose ``quarantine`` names what was left out and why.

    Raises:
        ConfigError: ``out`` exists, another process is writing it, an image's bytes cannot be had, or no image can be
            used.
    """
    if device == "cuda":
        import torch  # here, since reading headers does without it

        require(torch.cuda.is_available(), "there is no CUDA device to decode on: leave out --device cuda.")
    target = Path(out)
    require(not target.exists(), f"{target} exists already: remove it, or choose another name for the index.")
    partial = target.with_name(target.name + ".partial")
    mismatch = f"{partial} was begun with other images or another --verify: remove it to start afresh."
    with claimed(partial / "listing.json", _identity(listing, verify), mismatch):
        rows = np.arange(len(listing))
        chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        done = {int(name[:-4]) for name in os.listdir(partial) if name.endswith(".npz")}
        missing = [chunk for chunk in chunks if int(chunk[0]) not in done]

        with tqdm(
            total=len(listing), initial=len(listing) - sum(map(len, missing)), unit=" images", disable=not progress
        ) as bar:
            for checked in check_images(listing, missing, verify, device, workers or _processes(verify, device)):
                _save_chunk(partial, checked)
                bar.update(len(checked.rows))

        index = _assemble(partial, listing)
        if not len(index):
            name, reason = index.quarantine[0]
            raise ConfigError(
                f"none of the {counted(len(listing), 'image')} of {listing.root} can be used; the first, "
                f"{name}: {reason}."
            )
        save_index(index, target)
        shutil.rmtree(partial)
    return index


def _identity(listing: DatasetIndex, verify: Verify) -> dict[str, Any]:
    """What the finished chunks belong to."""
    # the names may be no UTF-8
    source = f"{verify} {listing.root.resolve()} {listing.shards}".encode(errors="surrogateescape")
    identity = hashlib.blake2b(source, digest_size=16)
    for array in (listing.names.text, listing.label, listing.offset, listing.masks.text):
        identity.update(np.ascontiguousarray(array).data)
    return {"listing": identity.hexdigest(), "chunk": _CHUNK}


def _save_chunk(partial: Path, checked: Checked) -> None:
    reasons = json.dumps(checked.reasons)
    first = checked.rows.min()
    beside = partial / f"{first}.tmp"
    with open(beside, "wb") as file:
        np.savez(file, rows=checked.rows, width=checked.width, height=checked.height, reasons=np.array(reasons))
    beside.rename(partial / f"{first}.npz")


def _assemble(partial: Path, listing: DatasetIndex) -> DatasetIndex:
    """The index of the images that passed, in the listing's order."""
    width, height = np.zeros(len(listing), np.int32), np.zeros(len(listing), np.int32)
    reasons: dict[int, str] = {}
    for file in sorted(name for name in os.listdir(partial) if name.endswith(".npz")):
        with np.load(partial / file) as chunk:
            width[chunk["rows"]], height[chunk["rows"]] = chunk["width"], chunk["height"]
            reasons |= {int(row): reason for row, reason in json.loads(str(chunk["reasons"])).items()}
    quarantine = (*listing.quarantine, *((listing.names[row], reasons[row]) for row in sorted(reasons)))
    sized = replace(listing, width=width, height=height, quarantine=quarantine)
    return sized if not reasons else sized.select(np.flatnonzero(width > 0))


def _processes(verify: Verify, device: str) -> int:
    cores = os.cpu_count() or 1
    return min(cores, _MOST_CONTEXTS) if verify == "full" and device == "cuda" else cores
