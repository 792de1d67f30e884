"""The stream of decoded random crops that one rank sees, restarted around images that cannot be decoded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_nepa.config import DataConfig
from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch, crop_pipeline, undecodable_slots
from megatron_nepa.data.decoding.encoded_images import encoded_images
from megatron_nepa.data.decoding.pipelines import DecoderOptions, ImagePipeline, Interpolation
from megatron_nepa.data.decoding.sample_reader import SampleReader
from megatron_nepa.data.decoding.substitution import SubstitutingPipeline
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.mixing import sample_order
from megatron_nepa.data.sampling.order import IntArray, crop_boxes


class CropStream:
    """Yields (uint8 [b, 3, S, S], the image number of each, int64 [b]) for the micro-batches of one rank, forever.

    The pixels belong to the decoding pipeline: use them on the current stream and drop them before the next call.

    Args:
        index: the images.
        config: crop, reader and substitution settings.
        image_size: side S of the crops.
        feed: which samples this rank loads.
        options: where and how images are decoded.
        interpolation: how the resize interpolates.
    """

    def __init__(
        self,
        index: DatasetIndex | Mixture,
        config: DataConfig,
        image_size: int,
        feed: Feed,
        options: DecoderOptions,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self._index, self._config, self._seed, self._share = index, config, feed.seed, feed.share
        self._image_size, self._options, self._interpolation = image_size, options, interpolation
        self._store = encoded_images(index)
        self._reader = SampleReader(
            index,
            config,
            options.num_threads,
            sample_order(index, feed.seed, feed.order),
            feed.share.local_samples,
            lambda sample, image: self._store.read(image),
            feed.bad_image_log,
            self._store.together,
        )
        self._images: dict[int, IntArray] = {}  # that the micro-batches under way show
        self._pipeline = SubstitutingPipeline(
            self._build, self._reader, self._undecodable_slots, feed.share.first_micro_batch(feed.consumed_samples)
        )

    def __iter__(self) -> Iterator[tuple[Tensor, IntArray]]:
        return self

    def __next__(self) -> tuple[Tensor, IntArray]:
        pixels = self._pipeline.next_images()
        return pixels, self._images.pop(self.micro_batch - 1)

    @property
    def micro_batch(self) -> int:
        """The micro-batch that comes next, counted from the start of the run."""
        return self._pipeline.micro_batch

    @property
    def num_bad_images(self) -> int:
        """Samples of this rank that another image had to stand in for."""
        return self._reader.num_bad_images

    def close(self) -> None:
        """Free the pipeline, its threads and the open files."""
        self._pipeline.close()
        self._store.close()

    def _build(self, first: int) -> ImagePipeline:
        size = self._share.local_size
        return crop_pipeline(
            lambda number: self._encoded(first + number), size, self._image_size, self._options, self._interpolation
        )

    def _encoded(self, micro_batch: int) -> EncodedBatch:
        contents, images = self._reader(micro_batch)
        self._images[micro_batch] = images
        samples, index = self._share.local_samples(micro_batch), self._index
        boxes = crop_boxes(self._seed, samples, index.width[images], index.height[images], self._config.crop_scale_min)
        return EncodedBatch(contents, boxes[:, :2].copy(), boxes[:, 2:].copy())

    def _undecodable_slots(self, micro_batch: int) -> list[int]:
        return undecodable_slots(self._encoded(micro_batch), self._options)
