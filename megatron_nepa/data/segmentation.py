"""Image and mask pairs: random resize, crop, flip and distortion for training; whole images for evaluation.

The recipe is mmsegmentation's for ADE20K, with every draw keyed by (seed, k).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from megatron_nepa.config import ConfigError, DataConfig, require
from megatron_nepa.data.evaluation import Geometry, OnePassLoader, Side
from megatron_nepa.data.headers import UnreadableImageError
from megatron_nepa.data.index import DatasetIndex
from megatron_nepa.data.loader import Batch
from megatron_nepa.data.masks import CROP_TRIES, IGNORED, SegmentationConfig, choose_crop, load_mask, scaled_size
from megatron_nepa.data.order import IntArray, flips, image_of_sample
from megatron_nepa.data.photometric import distort
from megatron_nepa.data.pipelines import DecoderOptions, new_pipeline, next_images, normalise
from megatron_nepa.data.reading import ReadAhead
from megatron_nepa.data.share import Share
from megatron_nepa.data.storage import ImageStore
from megatron_nepa.parallel.random import derive_key, uniform


class _Pair(NamedTuple):
    """One training sample before decoding."""

    encoded: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]  # [h, w], resized, cropped and mirrored
    roi: npt.NDArray[np.float32]  # [4]: y0, x0, y1, x1 of the crop in stored pixels
    mirrored: bool


class SegmentationLoader:
    """Iterates over the training micro-batches of one rank forever: Batch.labels is int64 [b, S, S].

    A random scale, a crop in which no class has more than ``cat_max_ratio`` (ten tries), a flip, photometric
    distortion. Images smaller than the crop are padded with 0 at the right and bottom, their labels with 255. The same
    for every grid, as in pre-training.

    Args:
        index: image and mask pairs.
        config: its num_threads and hw_decoder_load.
        segmentation: the geometry.
        seed: the run's seed.
        share: which samples this rank loads.
        device: where images are decoded and delivered.
        dtype: of the images.
        consumed_samples: samples of the steps already taken.

    Raises:
        ConfigError: an index without masks; while iterating, an image or mask that cannot be used, by name.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        segmentation: SegmentationConfig,
        seed: int,
        share: Share,
        device: torch.device,
        dtype: torch.dtype,
        consumed_samples: int = 0,
    ) -> None:
        require(len(index.masks) == len(index) > 0, f"{index.root} has no masks: index image and mask pairs.")
        self._index, self._config, self._seed, self._share = index, segmentation, seed, share
        self._device, self._dtype = device, dtype
        self._micro_batch = share.first_micro_batch(consumed_samples)
        self._store = ImageStore(index)
        self._read_ahead = ReadAhead(share.local_samples, self._read, config.num_threads)
        self._masks: dict[int, list[npt.NDArray[np.uint8]]] = {}
        self._pipeline = self._build(DecoderOptions.of(config, index, device))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        share, side = self._share, self._config.crop_size
        try:
            pixels = next_images(self._pipeline, self._device)
        except RuntimeError as error:
            numbers = image_of_sample(self._seed, share.local_samples(self._micro_batch), len(self._index))
            names = ", ".join(self._index.where(int(i)) for i in numbers)
            raise ConfigError(
                f"one of these images cannot be decoded: {names}; tools/index_dataset.py --verify full leaves it out."
            ) from error
        masks = self._masks.pop(self._micro_batch)
        labels = np.full((len(masks), side, side), IGNORED, np.uint8)
        inside = np.zeros((len(masks), 1, side, side), np.bool_)
        for i, mask in enumerate(masks):
            height, width = mask.shape
            labels[i, :height, :width] = mask
            inside[i, :, :height, :width] = True
        first = share.first_sample(self._micro_batch)
        sample_index = torch.arange(first, first + share.micro_batch_size, device=self._device)
        local = sample_index[share.local_start : share.local_start + share.local_size]
        images = normalise(distort(pixels, local, self._seed), None, torch.float32)
        images *= torch.from_numpy(inside).to(self._device)
        self._micro_batch += 1
        return Batch(images.to(self._dtype), sample_index, torch.from_numpy(labels).to(self._device).long())

    @property
    def consumed_samples(self) -> int:
        """Samples of the completed steps: the loader's whole state."""
        return self._share.consumed_samples(self._micro_batch)

    def close(self) -> None:
        """Free the pipeline and its threads."""
        del self._pipeline
        self._read_ahead.close()
        self._store.close()

    def _read(self, samples: IntArray) -> list[_Pair]:
        config, index = self._config, self._index
        images = image_of_sample(self._seed, samples, len(index))
        draws = uniform(derive_key(self._seed, "segmentation_crop"), samples, 1 + 2 * (CROP_TRIES + 1)).astype(
            np.float64
        )
        ratio = config.ratio[0] + (config.ratio[1] - config.ratio[0]) * draws[:, 0]
        sizes = scaled_size(index.width[images], index.height[images], config.scale, ratio)
        mirrored = flips(self._seed, samples)
        pairs = []
        for image, size, draw, mirror in zip(images.tolist(), sizes, draws[:, 1:], mirrored.tolist(), strict=True):
            try:
                encoded = self._store.read(image)
            except UnreadableImageError as error:
                raise ConfigError(f"{index.where(image)} cannot be read: {error}.") from error
            mask = load_mask(index, image, config.reduce_zero_label)
            (y, x), crop = choose_crop(mask, size, draw.reshape(-1, 2), config)
            scale = np.array(mask.shape) / size  # stored pixels of one scaled pixel
            roi = np.concatenate([(y, x) * scale, (y + crop.shape[0], x + crop.shape[1]) * scale])
            pairs.append(_Pair(encoded, crop[:, ::-1] if mirror else crop, roi.astype(np.float32), mirror))
        return pairs

    def _build(self, options: DecoderOptions) -> Pipeline:
        start, side = self._micro_batch, self._config.crop_size

        def source(number: int) -> tuple[object, ...]:
            pairs = [pair for part in self._read_ahead(start + number) for pair in part]
            self._masks[start + number] = [pair.mask for pair in pairs]
            roi = np.stack([pair.roi for pair in pairs])
            size = np.array([pair.mask.shape for pair in pairs], np.float32)
            mirrored = np.array([pair.mirrored for pair in pairs], np.int32)
            return [pair.encoded for pair in pairs], roi[:, :2].copy(), roi[:, 2:].copy(), size, mirrored

        pipeline = new_pipeline(self._share.local_size, options)
        with pipeline:
            encoded, roi_start, roi_end, size, mirrored = fn.external_source(
                source,
                num_outputs=5,
                batch=True,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, 1, 1, 1, 0],
            )
            image = fn.decoders.image(encoded, **options.decoder_arguments())
            # a resize of a region sees the pixels around it: the same as resizing the whole, then cropping
            image = fn.resize(
                image,
                size=size,
                roi_start=roi_start,
                roi_end=roi_end,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            image = fn.flip(image, horizontal=mirrored)
            image = fn.pad(image, axes=[0, 1], shape=[side, side], fill_value=0)
            pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]))
        pipeline.build()
        return pipeline


@dataclass(frozen=True)
class SegmentationImage:
    """One whole image of an evaluation."""

    images: Tensor  # [1, 3, h, w] in the model's dtype, scaled: the input of sliding windows
    labels: Tensor  # int64 [H, W] at the image's own size
    image_index: int
    valid: bool  # False for the repeat that fills up a rank's last round: leave it out of every sum


def evaluate_segmentation(
    index: DatasetIndex,
    config: DataConfig,
    segmentation: SegmentationConfig,
    data_rank: int,
    data_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[SegmentationImage]:
    """Every image of the set once over the ranks, scaled into ``segmentation.scale`` with its shape kept.

    Ranks yield equally many images; arguments are those of :class:`SegmentationLoader`.
    """
    require(len(index.masks) == len(index) > 0, f"{index.root} has no masks: index image and mask pairs.")

    def geometry(width: Side, height: Side) -> Geometry:
        size = scaled_size(width, height, segmentation.scale, np.ones(len(width)))
        return Geometry(size.astype(np.float32), np.zeros_like(size, np.int32), size.astype(np.int32))

    for batch in OnePassLoader(index, config, geometry, 1, data_rank, data_size, device, dtype, "bilinear"):
        image = int(batch.image_index)
        labels = torch.from_numpy(load_mask(index, image, segmentation.reduce_zero_label)).to(device).long()
        yield SegmentationImage(batch.images, labels, image, bool(batch.valid))
