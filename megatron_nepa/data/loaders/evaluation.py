"""Evaluation: every image exactly once over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, types
from torch import Tensor

from megatron_nepa.config import ConfigError, DataConfig, RankConfigError, require
from megatron_nepa.data.decoding.encoded_images import EncodedImages
from megatron_nepa.data.decoding.full_decode import decodes_whole
from megatron_nepa.data.decoding.normalising import normalise
from megatron_nepa.data.decoding.pipelines import (
    INTERPOLATIONS,
    DaliImages,
    DecoderOptions,
    Interpolation,
    new_pipeline,
)
from megatron_nepa.data.decoding.sample_reader import ReadAhead, reading_ahead
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.remote.folder import SourceLostError
from megatron_nepa.data.sampling.order import IntArray
from megatron_nepa.data.transfer import to_device


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of one rank; every rank sees equally many batches of equal size."""

    images: Tensor  # [b, 3, S, S] in the model's dtype
    labels: Tensor  # int64 [b]
    image_index: Tensor  # int64 [b], numbers in the index
    valid: Tensor  # bool [b], False for the repeats that fill up the last batch: leave them out of every sum


class Geometry(NamedTuple):
    """How each image of a batch is resized, and what is kept of it."""

    size: npt.NDArray[np.float32]  # [n, 2]: height, width after the resize
    start: npt.NDArray[np.int32]  # [n, 2]: y, x of the crop in that
    shape: npt.NDArray[np.int32]  # [n, 2]: height, width of the crop, equal for all images of a batch


Side = npt.NDArray[np.integer]
_REMEDY = "tools/index_dataset.py --verify full leaves such images out"


class OnePassLoader:
    """Iterates once over a data set, this rank's share of it, resizing and cropping as ``geometry`` says.

    Args:
        index: the images.
        config: its num_threads and hw_decoder_load.
        geometry: of stored widths and heights, [n] each.
        batch_size: images of a batch, at most.
        data_rank: which rank this is; image i is evaluated by rank i mod ``data_size``.
        data_size: number of ranks that see different images.
        device: where images are decoded and delivered.
        dtype: dtype of the images.
        interpolation: of the resize, which is antialiased.

    Raises:
        RankConfigError: while iterating, an image that cannot be decoded, by name.
        SourceLostError: while iterating, remote images that cannot be had.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        geometry: Callable[[Side, Side], Geometry],
        batch_size: int,
        data_rank: int,
        data_size: int,
        device: torch.device,
        dtype: torch.dtype,
        interpolation: Interpolation,
    ) -> None:
        self._index, self._geometry = index, geometry
        self._batch_size = min(batch_size, -(-len(index) // data_size))  # no more than a rank's images
        self._data_rank, self._data_size = data_rank, data_size
        self._device, self._dtype, self._interpolation = device, dtype, interpolation
        self._options = DecoderOptions.of(config, index, device)

    @property
    def is_remote(self) -> bool:
        """Whether the images lie behind URLs, whose source may be lost."""
        return self._index.is_remote

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return -(-len(self._index) // (self._batch_size * self._data_size))

    def __iter__(self) -> Iterator[EvaluationBatch]:
        encoded = EncodedImages(self._index)
        threads, depth = reading_ahead(self._index, self._options.num_threads, self._batch_size)
        reader = ReadAhead(self._images_of, lambda part: self._read_all(encoded, part.tolist()), threads, depth)
        pipeline = self._build(reader)
        label = np.asarray(self._index.label)
        try:
            for batch in range(len(self)):
                numbers, images = self._images_of(batch), self._decode(pipeline, encoded, batch)
                place = self._data_rank + self._data_size * np.arange(
                    batch * self._batch_size, (batch + 1) * self._batch_size
                )
                yield EvaluationBatch(
                    normalise(images, None, self._dtype),
                    to_device(label[numbers].astype(np.int64), self._device),
                    to_device(numbers, self._device),
                    to_device(place < len(self._index), self._device),
                )
        finally:
            pipeline.close()
            reader.close()
            encoded.close()

    def _images_of(self, batch: int) -> IntArray:
        """Images of this rank's batch; past the end of the data its last image, past the last batch nothing."""
        if batch >= len(self):
            return np.zeros(0, np.int64)
        places = np.arange(batch * self._batch_size, (batch + 1) * self._batch_size)
        return np.minimum(self._data_rank + self._data_size * places, len(self._index) - 1)

    def _read_all(self, encoded: EncodedImages, images: list[int]) -> list[npt.NDArray[np.uint8]]:
        with encoded.together(images):
            return [self._read(encoded, image) for image in images]

    def _read(self, encoded: EncodedImages, image: int) -> npt.NDArray[np.uint8]:
        try:
            return encoded.read(image)
        except UnreadableImageError as error:
            raise RankConfigError(f"{self._index.where(image)} cannot be read: {error}; {_REMEDY}.") from error
        except SourceLostError:
            raise
        except ConfigError as error:
            raise RankConfigError(str(error)) from error

    def _build(self, reader: ReadAhead[list[npt.NDArray[np.uint8]]]) -> DaliImages:
        def source(batch: int) -> tuple[Any, ...]:
            images = self._images_of(batch)
            if not len(images):
                raise StopIteration
            encoded = [content for part in reader(batch) for content in part]
            return encoded, *self._geometry(self._index.width[images], self._index.height[images])

        pipeline = new_pipeline(self._batch_size, self._options)
        with pipeline:
            encoded, size, start, shape = fn.external_source(
                source,
                num_outputs=4,
                batch=True,
                dtype=[types.UINT8, types.FLOAT, types.INT32, types.INT32],
                ndim=[1, 1, 1, 1],
            )
            image = fn.decoders.image(encoded, **self._options.decoder_arguments())
            image = fn.resize(image, size=size, interp_type=INTERPOLATIONS[self._interpolation], antialias=True)
            image = fn.slice(image, start=start, shape=shape, axes=[0, 1])
            pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]))
        pipeline.build()
        return DaliImages(pipeline, self._device)

    def _decode(self, pipeline: DaliImages, encoded: EncodedImages, batch: int) -> Tensor:
        try:
            return pipeline.next_images()
        except RuntimeError as error:
            images, device = self._images_of(batch).tolist(), self._device.type
            bad = [self._index.where(i) for i in images if not decodes_whole(encoded, self._index, i, device)]
            if not bad:  # every image decodes by itself: whatever it was, it was no bad image
                raise
            raise RankConfigError(f"{', '.join(bad)} cannot be decoded; {_REMEDY}.") from error


def decode_all(batches: Iterable[object], interrupted: Callable[[], bool]) -> None:
    """Read and decode a rank's share of a set, and drop it: what cannot be evaluated is found before it is needed.

    Args:
        batches: an :class:`OnePassLoader`, or what is built on one.
        interrupted: asked between them, on this rank alone.

    Raises:
        RankConfigError: an image that cannot be decoded, by name, or a source that is lost.
    """
    try:
        for _ in batches:
            if interrupted():
                return
    except SourceLostError as error:
        raise RankConfigError(str(error)) from error


class EvaluationLoader(OnePassLoader):
    """Evaluation of a classifier: ``Resize(resize_size)`` on the shorter side and ``CenterCrop(image_size)``.

    Args:
        index: the images.
        config: its num_threads and hw_decoder_load.
        image_size: side S of the crop.
        resize_size: length of the shorter side before the crop.
        squash: resize both sides to ``resize_size``, whatever the ratio (the release's evaluation of its large model).
        batch_size: as in :class:`OnePassLoader`, like the five that follow.
        data_rank: see there.
        data_size: see there.
        device: see there.
        dtype: see there.
        interpolation: see there.

    Raises:
        ConfigError: a crop larger than the resized image.
        RankConfigError: while iterating, an image that cannot be decoded, by name.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        image_size: int,
        resize_size: int,
        squash: bool,
        batch_size: int,
        data_rank: int,
        data_size: int,
        device: torch.device,
        dtype: torch.dtype,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        require(
            resize_size >= image_size,
            f"the crop of {image_size} pixels is larger than the resized image's shorter side of {resize_size}.",
        )

        def geometry(width: Side, height: Side) -> Geometry:
            sides = np.stack([height, width], axis=1).astype(np.int64)
            if squash:
                size = np.full_like(sides, resize_size)
            else:
                size = resize_size * sides // sides.min(axis=1, keepdims=True)  # torchvision cuts the fraction off too
            start = np.rint((size - image_size) / 2).astype(np.int32)
            return Geometry(size.astype(np.float32), start, np.full_like(start, image_size))

        super().__init__(index, config, geometry, batch_size, data_rank, data_size, device, dtype, interpolation)
