"""Tensors of which every rank holds a share, in the safetensors files of a folder, by torch.distributed.checkpoint.

That is imported when it is first used: a start without a checkpoint does without its several hundred files.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_nepa.checkpoint.format.agreement import RankError


def save_shares(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's share of ``state``; every rank of ``group`` calls it, or this process alone where it is None.

    Raises:
        RankError: on every rank, where one could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    _quiet()
    names = inspect.signature(HuggingFaceStorageWriter).parameters
    sharded = "save_distributed" if "save_distributed" in names else "save_sharded"  # its name in torch 2.8
    options: dict[str, Any] = {sharded: True}
    writer = HuggingFaceStorageWriter(str(folder), **options)
    try:
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # its text is the traceback of every rank
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RankError(f"rank {rank}: {cause or type(cause).__name__}") from error


def load_shares(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill the tensors of ``state``; every rank of ``group`` calls it, or this process alone where it is None."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    _quiet()
    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)


def read_entries(folder: Path) -> Mapping[str, Any]:
    """What torch knows of every tensor in ``folder`` (``size``, ``properties.dtype``), by its key."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    entries: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return entries


def _quiet() -> None:
    """Silence torch's reports of every save and load, and its guess that one process was meant (it was)."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
