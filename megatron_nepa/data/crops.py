"""The stream of decoded random crops that one rank sees, restarted around images that cannot be decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvidia.dali import Pipeline
from torch import Tensor

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index import DatasetIndex
from megatron_nepa.data.order import IntArray
from megatron_nepa.data.pipelines import DecoderOptions, Interpolation, crop_pipeline, decodes_alone, next_images
from megatron_nepa.data.reading import SampleReader, failed_slots
from megatron_nepa.data.share import Share


class CropStream:
    """Yields (uint8 [b, 3, S, S], the image number of each, int64 [b]) for the micro-batches of one rank, forever.

    The pixels belong to the decoding pipeline: use them on the current stream and drop them before the next call.

    Args:
        index: the images.
        config: crop, reader and substitution settings.
        image_size: side S of the crops.
        seed: the run's seed.
        share: which samples this rank loads.
        options: where and how images are decoded.
        consumed_samples: samples of the steps already taken.
        bad_image_log: JSON-lines file that substituted images are appended to.
        interpolation: of the resize.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        image_size: int,
        seed: int,
        share: Share,
        options: DecoderOptions,
        consumed_samples: int = 0,
        bad_image_log: Path | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        # the micro-batch that comes next, counted from the start of the run
        self.micro_batch = share.first_micro_batch(consumed_samples)
        self._share, self._image_size, self._options = share, image_size, options
        self._interpolation: Interpolation = interpolation
        self._reader = SampleReader(index, config, seed, share.local_samples, bad_image_log)
        self._pipeline = self._build()

    def __iter__(self) -> Iterator[tuple[Tensor, IntArray]]:
        return self

    def __next__(self) -> tuple[Tensor, IntArray]:
        while True:
            try:
                images = next_images(self._pipeline, self._options.device)
                break
            except RuntimeError as error:
                slots = failed_slots(str(error)) or self._undecodable_slots()
                if not slots:  # every image decodes by itself: whatever it was, it was no bad image
                    raise
                self._reader.reject(self.micro_batch, slots, "the decoder refuses it")
                self._pipeline = self._build()  # the old one is dead since the error
        numbers = self._reader.images_of(self.micro_batch)
        self.micro_batch += 1
        return images, numbers

    @property
    def num_bad_images(self) -> int:
        """Samples of this rank that another image had to stand in for."""
        return self._reader.num_bad_images

    def close(self) -> None:
        """Free the pipeline and its threads."""
        del self._pipeline
        self._reader.close()

    def _build(self) -> Pipeline:
        start, size = self.micro_batch, self._share.local_size
        return crop_pipeline(
            lambda number: self._reader(start + number), size, self._image_size, self._options, self._interpolation
        )

    def _undecodable_slots(self) -> list[int]:
        batch = self._reader(self.micro_batch)
        size, options = self._image_size, self._options
        return [slot for slot in range(len(batch.encoded)) if not decodes_alone(batch, slot, size, options)]
