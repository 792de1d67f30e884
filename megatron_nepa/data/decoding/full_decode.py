"""Decodes single whole images with the decoder that training uses, to learn whether it can."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types

from megatron_nepa.data.decoding.encoded_images import EncodedImages
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError


def full_decode(data: npt.NDArray[np.uint8], size: tuple[int, int], device: str) -> None:
    """Decode every pixel of one image and drop them.

    Args:
        data: the encoded image, uint8 [n].
        size: width and height that its header states.
        device: "cpu" or "cuda".

    Raises:
        UnreadableImageError: the decoder refuses it, or finds another size.
    """
    pipeline = _pipeline(device)
    try:
        pipeline.feed_input("encoded", [data])
        shape = pipeline.run()[0].shape()[0]
    except RuntimeError as error:
        _pipeline.cache_clear()  # dead since the error
        raise UnreadableImageError("the decoder refuses it") from error
    if (shape[1], shape[0]) != size:
        raise UnreadableImageError(f"its header says {size[0]} x {size[1]}, the decoder {shape[1]} x {shape[0]}")


def decodes_whole(images: EncodedImages, index: DatasetIndex, image: int, device: str) -> bool:
    """Whether image ``image`` can be read and passes :func:`full_decode`."""
    try:
        full_decode(images.read(image), (int(index.width[image]), int(index.height[image])), device)
    except UnreadableImageError:
        return False
    return True


@lru_cache(maxsize=1)
def _pipeline(device: str) -> Pipeline:
    on_gpu = device == "cuda"
    pipeline = Pipeline(1, 1, torch.cuda.current_device() if on_gpu else None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(encoded, adjust_orientation=False, device="mixed" if on_gpu else "cpu")
        pipeline.set_outputs(image)
    pipeline.build()
    return pipeline
