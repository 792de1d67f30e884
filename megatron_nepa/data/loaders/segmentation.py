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
from nvidia.dali import fn, types
from torch import Tensor

from megatron_nepa.config import IGNORED, ConfigError, CropConfig, DataConfig, MaskConfig, RankConfigError
from megatron_nepa.data.augmentation.photometric import distort
from megatron_nepa.data.decoding.encoded_images import EncodedImages
from megatron_nepa.data.decoding.full_decode import decodes_whole
from megatron_nepa.data.decoding.masks import CROP_TRIES, choose_crop, load_mask, scaled_size
from megatron_nepa.data.decoding.normalising import normalise
from megatron_nepa.data.decoding.pipelines import DaliImages, DecoderOptions, ImagePipeline, new_pipeline
from megatron_nepa.data.decoding.sample_reader import SampleReader
from megatron_nepa.data.decoding.substitution import SubstitutingPipeline
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.pairs import require_masks
from megatron_nepa.data.loaders.evaluation import Geometry, OnePassLoader, Side
from megatron_nepa.data.loaders.pretraining import Batch
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.mixing import sample_order
from megatron_nepa.data.sampling.order import IntArray, flips
from megatron_nepa.data.transfer import to_device
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
    for every grid, and around pairs that cannot be used, as in pre-training.

    Args:
        index: image and mask pairs.
        config: its num_threads, hw_decoder_load, on_bad_image and max_bad_share.
        crops: the geometry.
        masks: the classes.
        image_size: side S of the crops.
        feed: which samples this rank loads, and where they go.

    Raises:
        ConfigError: an index without masks; while iterating, a mask with a value that is no class, or an image or mask
            that cannot be used where ``config.on_bad_image`` is "fail", or more of them than ``config.max_bad_share``
            allows.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        crops: CropConfig,
        masks: MaskConfig,
        image_size: int,
        feed: Feed,
    ) -> None:
        require_masks(index)
        self._index, self._crops, self._mask_config, self._side = index, crops, masks, image_size
        self._seed, self._share = feed.seed, feed.share
        self._device, self._dtype = feed.device, feed.dtype
        self._options = DecoderOptions.of(config, index, feed.device)
        self._store = EncodedImages(index)
        self._reader = SampleReader(
            index,
            config,
            self._options.num_threads,
            sample_order(index, feed.seed, feed.order),
            feed.share.local_samples,
            self._read,
            feed.bad_image_log,
        )
        # masks and image numbers of the micro-batches under way
        self._shown: dict[int, tuple[list[npt.NDArray[np.uint8]], IntArray]] = {}
        self._pipeline = SubstitutingPipeline(
            self._build, self._reader, self._undecodable_slots, feed.share.first_micro_batch(feed.consumed_samples)
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        share, side, micro_batch = self._share, self._side, self._pipeline.micro_batch
        pixels = self._pipeline.next_images()
        masks, numbers = self._shown.pop(micro_batch)
        labels = np.full((len(masks), side, side), IGNORED, np.uint8)
        inside = np.zeros((len(masks), 1, side, side), np.bool_)
        for i, mask in enumerate(masks):
            height, width = mask.shape
            labels[i, :height, :width] = mask
            inside[i, :, :height, :width] = True
        first = share.first_sample(micro_batch)
        sample_index = torch.arange(first, first + share.micro_batch_size, device=self._device)
        local = sample_index[share.local_start : share.local_start + share.local_size]
        images = normalise(distort(pixels, local, self._seed), None, torch.float32)
        images *= to_device(inside, self._device)
        targets = to_device(labels, self._device).long()
        return Batch(images.to(self._dtype), sample_index, targets, numbers)

    @property
    def consumed_samples(self) -> int:
        """Samples of the completed steps: the loader's whole state."""
        return self._share.consumed_samples(self._pipeline.micro_batch)

    @property
    def num_bad_images(self) -> int:
        """Samples of this rank that another pair had to stand in for."""
        return self._reader.num_bad_images

    def close(self) -> None:
        """Free the pipeline, its threads and the open files."""
        self._pipeline.close()
        self._store.close()

    def _read(self, sample: int, image: int) -> _Pair:
        """Read an image, and its mask, which decides the crop."""
        crops, index, side = self._crops, self._index, self._side
        encoded, mask = self._store.read(image), load_mask(index, image, self._mask_config)
        k, one = np.array([sample]), slice(image, image + 1)
        draws = uniform(derive_key(self._seed, "segmentation_crop"), k, 1 + 2 * (CROP_TRIES + 1))[0].astype(np.float64)
        ratio = crops.ratio_min + (crops.ratio_max - crops.ratio_min) * draws[:1]
        size = scaled_size(index.width[one], index.height[one], crops.scale(side), ratio)[0]
        (y, x), crop = choose_crop(mask, size, draws[1:].reshape(-1, 2), side, crops.cat_max_ratio)
        mirrored = bool(flips(self._seed, k)[0])
        scale = np.array(mask.shape) / size  # stored pixels of one scaled pixel
        roi = np.concatenate([(y, x) * scale, (y + crop.shape[0], x + crop.shape[1]) * scale])
        return _Pair(encoded, crop[:, ::-1] if mirrored else crop, roi.astype(np.float32), mirrored)

    def _undecodable_slots(self, micro_batch: int) -> list[int]:
        _, images = self._reader(micro_batch)
        return [
            slot
            for slot, image in enumerate(images.tolist())
            if not decodes_whole(self._store, self._index, image, self._device.type)
        ]

    def _build(self, first: int) -> ImagePipeline:
        side = self._side

        def source(number: int) -> tuple[object, ...]:
            pairs, numbers = self._reader(first + number)
            self._shown[first + number] = [pair.mask for pair in pairs], numbers
            roi = np.stack([pair.roi for pair in pairs])
            size = np.array([pair.mask.shape for pair in pairs], np.float32)
            mirrored = np.array([pair.mirrored for pair in pairs], np.int32)
            return [pair.encoded for pair in pairs], roi[:, :2].copy(), roi[:, 2:].copy(), size, mirrored

        pipeline = new_pipeline(self._share.local_size, self._options)
        with pipeline:
            encoded, roi_start, roi_end, size, mirrored = fn.external_source(
                source,
                num_outputs=5,
                batch=True,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, 1, 1, 1, 0],
            )
            image = fn.decoders.image(encoded, **self._options.decoder_arguments())
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
        return DaliImages(pipeline, self._device)


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
    crops: CropConfig,
    masks: MaskConfig,
    image_size: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[SegmentationImage]:
    """Every image of the set once over the ranks, scaled as ``crops`` says with its shape kept.

    Ranks yield equally many images; arguments are those of :class:`SegmentationLoader`.

    Raises:
        ConfigError: an index without masks.
        RankConfigError: while iterating, an image or mask that cannot be used, by name.
    """
    require_masks(index)

    def geometry(width: Side, height: Side) -> Geometry:
        size = scaled_size(width, height, crops.scale(image_size), np.ones(len(width)))
        return Geometry(size.astype(np.float32), np.zeros_like(size, np.int32), size.astype(np.int32))

    for batch in OnePassLoader(index, config, geometry, 1, data_rank, data_size, device, dtype, "bilinear"):
        image = int(batch.image_index)
        try:
            mask = load_mask(index, image, masks)
        except UnreadableImageError as error:
            raise RankConfigError(f"{index.where(image)} cannot be evaluated: {error}.") from error
        except ConfigError as error:
            raise RankConfigError(str(error)) from error
        labels = to_device(mask, device).long()
        yield SegmentationImage(batch.images, labels, image, bool(batch.valid))
