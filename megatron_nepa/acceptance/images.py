"""Images to decode: photographs of the installed packages, and the stream of a run over them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_nepa.acceptance.check import NotRun
from megatron_nepa.acceptance.setting import Setting
from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.decoding.crop_stream import CropStream
from megatron_nepa.data.decoding.normalising import normalise
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.index import builtin
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.doctor.decoding import photographs

PHOTOGRAPHS_REMEDY = "carry along scikit-image and scikit-learn, which hold photographs."


@contextmanager
def folder_of_photographs() -> Iterator[Path]:
    """Some JPEGs, in a folder that is removed behind the block.

    Raises:
        NotRun: the packages that hold them are not installed.
    """
    folder = Path(tempfile.mkdtemp(prefix="acceptance-"))
    try:
        photographs(folder)
        yield folder
    except ConfigError as error:
        raise NotRun(str(error), PHOTOGRAPHS_REMEDY) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def builtin_index() -> DatasetIndex:
    """The built-in set.

    Raises:
        NotRun: the packages that hold its photographs are not installed.
    """
    try:
        return builtin.builtin_index(verbose=False)
    except ConfigError as error:
        raise NotRun(str(error), PHOTOGRAPHS_REMEDY) from None


def crop_stream(
    setting: Setting, index: DatasetIndex, size: int, batch: int, load: float | None = None, threads: int | None = None
) -> CropStream:
    """The stream of one rank: uint8 crops of ``size`` on the device, with a run's own settings or these."""
    chosen = {"hw_decoder_load": load, "num_threads": threads}
    config = DataConfig(**{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    device = setting.calls.device
    feed = Feed(Share(batch, batch, 1, 0, 1, 0, 1), 0, device, torch.bfloat16)
    return CropStream(index, config, size, feed, DecoderOptions.of(config, index, device))


@contextmanager
def decoded_batches(setting: Setting, size: int, batch: int) -> Iterator[Iterator[Tensor]]:
    """Batches of the built-in set as training decodes them, bf16 [batch, 3, size, size].

    Raises:
        NotRun: the packages that hold its photographs are not installed.
    """
    stream = crop_stream(setting, builtin_index(), size, batch)
    try:
        yield (normalise(pixels, None, torch.bfloat16) for pixels, _ in stream)
    finally:
        stream.close()
