"""The micro-batches of one rank: exact, elastic, and with one integer of state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_nepa.config import DataConfig, require
from megatron_nepa.data.decoding.normalising import normalise
from megatron_nepa.data.index.builtin import builtin_index
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.index_file import is_index, load_index
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.mixture_grammar import read_mixture
from megatron_nepa.data.index.remote_shards import check_remote
from megatron_nepa.data.remote.folder import Access, RemoteFolder, is_url
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import IntArray, flip_key
from megatron_nepa.data.sampling.source_weights import SourceWeights
from megatron_nepa.parallel.random import uniform_tensor
from megatron_nepa.terminal import counted

SYNTHETIC = "synthetic"
_LONG_SCAN = 10.0  # seconds after which an index is worth a hint


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    # [b, 3, S, S] in the model's dtype: the replica's micro-batch, or this tensor-parallel rank's equal share of it
    images: Tensor
    # int64 [micro_batch_size], always the whole micro-batch's sample numbers: the keys of the model's draws
    sample_index: Tensor
    # of each image: its class, int64 [b], or its soft target, fp32 [b, classes]
    labels: Tensor | None = None
    # the image of the index that each shows, int64 [b] on the host; none where there is no index
    image_index: IntArray | None = None
    # optimizer step that the samples belong to, counted from 0
    step: int = 0
    # of a mixture: the sources that the step shows samples of, by name, each with its weights, fp32 [micro_batch_size]:
    # the mean over a step's micro-batches of (weights x each sample's loss) summed is the mean loss of its samples
    source_weights: dict[str, Tensor] = field(default_factory=dict)


class PretrainingLoader:
    """Iterates over the micro-batches of one rank forever, decoding with DALI on its device.

    The same (image, crop, flip) sequence for every (data_size, tensor_size, micro_batch_size, accumulation_steps) of
    one global batch, every thread count, and every restart at a step.

    Args:
        index: the images.
        config: crop, flip and decoder settings.
        image_size: side S of the crops.
        feed: which samples this rank loads, and where they go.

    Raises:
        ConfigError: a restart inside a step; while iterating, an image that cannot be decoded where
            ``config.on_bad_image`` is "fail", or more of them than ``config.max_bad_share`` allows.
    """

    def __init__(
        self,
        index: DatasetIndex | Mixture,
        config: DataConfig,
        image_size: int,
        feed: Feed,
    ) -> None:
        # imported here: they bring DALI, which synthetic images do without
        from megatron_nepa.data.decoding.crop_stream import CropStream
        from megatron_nepa.data.decoding.pipelines import DecoderOptions

        self._crops = CropStream(index, config, image_size, feed, DecoderOptions.of(config, index, feed.device))
        self._share, self._device, self._dtype = feed.share, feed.device, feed.dtype
        self._flip_key = flip_key(feed.seed) if config.horizontal_flip else None
        self._weights = SourceWeights(index, feed) if isinstance(index, Mixture) else None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        share = self._share
        micro_batch = self._crops.micro_batch
        first = share.first_sample(micro_batch)
        images, numbers = next(self._crops)
        sample_index = torch.arange(first, first + share.micro_batch_size, device=self._device)
        flip = None
        if self._flip_key is not None:
            local = sample_index[share.local_start : share.local_start + share.local_size]
            flip = uniform_tensor(self._flip_key, local, 1)[:, 0] < 0.5
        weights = {} if self._weights is None else self._weights.of(micro_batch)
        step, pixels = share.step_of(first), normalise(images, flip, self._dtype)
        return Batch(pixels, sample_index, image_index=numbers, step=step, source_weights=weights)

    @property
    def consumed_samples(self) -> int:
        """Samples of the completed steps: the loader's whole state."""
        return self._share.consumed_samples(self._crops.micro_batch)

    @property
    def num_bad_images(self) -> int:
        """Samples of this rank that another image had to stand in for, since the loader was made."""
        return self._crops.num_bad_images

    def close(self) -> None:
        """Free the pipeline and its threads; the loader cannot be used afterwards."""
        self._crops.close()


class SyntheticLoader:
    """The interface of :class:`PretrainingLoader` over random images made once on the device.

    No decoding and no disk: what remains is the model's own speed.
    """

    num_bad_images = 0

    def __init__(self, image_size: int, feed: Feed) -> None:
        share, device = feed.share, feed.device
        self._share = share
        self._micro_batch = share.first_micro_batch(feed.consumed_samples)
        generator = torch.Generator(device).manual_seed(feed.seed)
        shape = (share.micro_batch_size, 3, image_size, image_size)
        images = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1).to(feed.dtype)
        self._images = images[share.local_start :][: share.local_size].clone()
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._share.first_sample(self._micro_batch)
        self._micro_batch += 1
        sample_index = torch.arange(first, first + self._share.micro_batch_size, device=self._device)
        return Batch(self._images, sample_index, step=self._share.step_of(first))

    @property
    def consumed_samples(self) -> int:
        """Samples of the completed steps."""
        return self._share.consumed_samples(self._micro_batch)

    def close(self) -> None:
        """Nothing to free; here for the interface."""


def build_index(config: DataConfig, verbose: bool = True) -> DatasetIndex | None:
    """The index that ``config.path`` names.

    Args:
        config: path None takes the built-in photographs, "synthetic" none; else an index that
            tools/index_dataset.py wrote, an ImageFolder tree or a flat folder.
        verbose: say in one line each what was made or left out (one rank of a node is enough).

    Returns:
        The index; None for synthetic images.

    Raises:
        ConfigError: a missing or empty folder, or one without a readable image; a mixture.
    """
    if config.path == SYNTHETIC:
        return None
    require(
        config.path is None or read_mixture(config.path) is None,
        f"{config.path} is a mixture of sets, which pre-training alone draws from: give one set.",
    )
    return open_set(config, verbose)


def open_set(config: DataConfig, verbose: bool) -> DatasetIndex:
    """An index, an ImageFolder tree, a flat folder or, where ``config.path`` is None, the built-in photographs.

    Raises:
        ConfigError: a missing or empty folder, or one without a readable image.
    """
    if config.path is None:
        index = builtin_index(verbose)
    elif is_index(config.path):
        index = load_index(config.path)
        if isinstance(index.root, RemoteFolder):
            index = replace(index, root=replace(index.root, access=Access.of(config)))
            check_remote(index, every_shard=verbose)
    else:
        require(
            not is_url(config.path),
            f"{config.path} is a URL: index its shards with tools/index_dataset.py, and give the index as --data.",
        )
        folder = Path(config.path)
        start = time.monotonic()
        index = scan_folder(folder)
        seconds = time.monotonic() - start
        if verbose and seconds > _LONG_SCAN:
            print(f"reading {len(index)} headers took {seconds:.0f} s: tools/index_dataset.py makes this instant.")
        if verbose and index.notes:
            images, classes = counted(len(index), "image"), counted(index.num_classes, "class", "classes")
            print(f"{folder}: {images}, {classes}; {'; '.join(index.notes)}")
    if index.quarantine and verbose:
        name, reason = index.quarantine[0]
        unreadable = counted(len(index.quarantine), "unreadable image")
        print(f"left out {unreadable} of {index.root}; the first, {name}: {reason}")
    return index
