"""From encoded images and boxes to equal squares of pixels: the decoding of training, on a GPU or on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, fn, types

from megatron_nepa.data.decoding.pipelines import (
    INTERPOLATIONS,
    DaliImages,
    DecoderOptions,
    ImagePipeline,
    Interpolation,
    new_pipeline,
)
from megatron_nepa.data.decoding.resizing import ThreadedResize


class EncodedBatch(NamedTuple):
    """What a decoding pipeline is fed for one batch of n images."""

    encoded: list[npt.NDArray[np.uint8]]  # file contents
    start: npt.NDArray[np.int32]  # [n, 2]: x, y of the region to decode, in stored pixels
    shape: npt.NDArray[np.int32]  # [n, 2]: its width, height


Source = Callable[[int], EncodedBatch]  # of the batch's number since the pipeline was built


def crop_pipeline(
    source: Source,
    batch_size: int,
    image_size: int,
    options: DecoderOptions,
    interpolation: Interpolation = "bilinear",
) -> ImagePipeline:
    """Decode a region of each image and resize it to a square: antialiased, EXIF orientation ignored.

    On a GPU DALI does both. On a CPU it decodes, and torch resizes: there DALI's own resize takes twice the time of the
    decoding before it.

    Args:
        source: called with 0, 1, ... ahead of the batches that are asked for.
        batch_size: images n of a batch.
        image_size: side S of the output.
        options: where and how images are decoded.
        interpolation: how the resize interpolates.

    Returns:
        A pipeline whose images are uint8 [n, 3, S, S].
    """
    if options.on_gpu:
        return DaliImages(_region_pipeline(source, batch_size, options, (image_size, interpolation)), options.device)
    regions = _region_pipeline(source, batch_size, options)
    return ThreadedResize(regions, image_size, interpolation, options.num_threads)


def _region_pipeline(
    source: Source, batch_size: int, options: DecoderOptions, resized_to: tuple[int, Interpolation] | None = None
) -> Pipeline:
    """A built pipeline of regions, uint8 [H, W, 3]; or, where ``resized_to`` names side and filter, of [3, S, S]."""
    pipeline = new_pipeline(batch_size, options)
    with pipeline:
        encoded, start, shape = fn.external_source(
            source, num_outputs=3, batch=True, dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1]
        )
        image = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[1, 0],  # the box is (x, y), the image [H, W, C]
            **options.decoder_arguments(),
        )
        if resized_to is not None:
            side, interpolation = resized_to
            image = fn.resize(image, size=[side, side], interp_type=INTERPOLATIONS[interpolation], antialias=True)
            image = fn.transpose(image, perm=[2, 0, 1])
        pipeline.set_outputs(image)
    pipeline.build()
    return pipeline


def undecodable_slots(batch: EncodedBatch, options: DecoderOptions) -> list[int]:
    """The slots of a batch whose regions do not decode, found by halving what does not.

    One bad image of n takes about 2 log2(n) small pipelines.
    """

    def search(slots: list[int]) -> list[int]:
        if _decodes(batch, slots, options):
            return []
        if len(slots) == 1:
            return slots
        middle = len(slots) // 2
        return search(slots[:middle]) + search(slots[middle:])

    return search(list(range(len(batch.encoded))))


def _decodes(batch: EncodedBatch, slots: list[int], options: DecoderOptions) -> bool:
    """Whether the regions in ``slots`` decode without the others."""
    part = EncodedBatch([batch.encoded[slot] for slot in slots], batch.start[slots], batch.shape[slots])
    try:
        _region_pipeline(lambda number: part, len(slots), options).run()
    except RuntimeError:
        return False
    return True
