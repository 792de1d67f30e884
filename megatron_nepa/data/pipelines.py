"""DALI graphs, and the one torch function that turns their uint8 pixels into the model's input.

DALI hands out uint8 (it has no bfloat16, and a byte halves what leaves it); flip, normalisation and cast follow on the
training device. With a GPU the JPEGs are decoded there and no pixel passes through the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index import DatasetIndex

Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
PREFETCH = 2  # batches decoded ahead: depth 1 to 4 measured within noise, and each batch costs memory


class EncodedBatch(NamedTuple):
    """What a decoding pipeline is fed for one batch of n images."""

    encoded: list[npt.NDArray[np.uint8]]  # file contents
    start: npt.NDArray[np.int32]  # [n, 2]: x, y of the region to decode, in stored pixels
    shape: npt.NDArray[np.int32]  # [n, 2]: its width, height


Source = Callable[[int], EncodedBatch]  # of the batch's number since the pipeline was built


@dataclass(frozen=True)
class DecoderOptions:
    """Where and how images are decoded; the settings of a GPU's decoder are ignored on a CPU."""

    device: torch.device
    num_threads: int
    hw_decoder_load: float
    # most images are no larger than this: the GPU decoder's buffers are allocated once for it
    width_hint: int
    height_hint: int

    @classmethod
    def of(cls, config: DataConfig, index: DatasetIndex, device: torch.device) -> DecoderOptions:
        """The options of ``config``, with size hints from the images of ``index``."""
        # not the largest: one panorama would reserve its size for every image in flight
        width, height = (int(np.percentile(side[:1_000_000], 99.9)) for side in (index.width, index.height))
        return cls(device, config.num_threads, config.hw_decoder_load, width, height)

    def decoder_arguments(self) -> dict[str, Any]:
        """Arguments of every ``fn.decoders`` call."""
        return {
            "adjust_orientation": False,  # the index holds stored sizes, and PIL and torchvision ignore EXIF too
            "jpeg_fancy_upsampling": True,  # nvJPEG's default chroma upsampling differs from libjpeg's
            "hw_decoder_load": self.hw_decoder_load,
            "preallocate_width_hint": self.width_hint,
            "preallocate_height_hint": self.height_hint,
            "device": "mixed" if self.on_gpu else "cpu",
        }

    @property
    def on_gpu(self) -> bool:
        """Whether decoding runs on a GPU."""
        return self.device.type == "cuda"


def new_pipeline(batch_size: int, options: DecoderOptions) -> Pipeline:
    """An empty pipeline on the device of ``options``."""
    device_id = None
    if options.on_gpu:
        index = options.device.index
        device_id = torch.cuda.current_device() if index is None else index
    return Pipeline(batch_size, options.num_threads, device_id, prefetch_queue_depth=PREFETCH)


def crop_pipeline(
    source: Source,
    batch_size: int,
    image_size: int,
    options: DecoderOptions,
    interpolation: Interpolation = "bilinear",
) -> Pipeline:
    """Decode a region of each image and resize it to a square: antialiased, EXIF orientation ignored.

    Args:
        source: called with 0, 1, ... ahead of the batches that are asked for.
        batch_size: images n of a batch.
        image_size: side S of the output.
        options: where to decode.
        interpolation: of the resize.

    Returns:
        A built pipeline whose :func:`next_images` is uint8 [n, 3, S, S].
    """
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
        image = fn.resize(
            image, size=[image_size, image_size], interp_type=INTERPOLATIONS[interpolation], antialias=True
        )
        pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]))
    pipeline.build()
    return pipeline


def decodes_alone(batch: EncodedBatch, slot: int, image_size: int, options: DecoderOptions) -> bool:
    """Whether one image of a batch passes a :func:`crop_pipeline` of its own: finds the one that killed the batch's."""
    one = EncodedBatch([batch.encoded[slot]], batch.start[slot : slot + 1], batch.shape[slot : slot + 1])
    try:
        crop_pipeline(lambda number: one, 1, image_size, options).run()
    except RuntimeError:
        return False
    return True


def next_images(pipeline: Pipeline, device: torch.device) -> Tensor:
    """The next batch of a pipeline as a torch tensor on ``device``, without a copy.

    The memory belongs to the pipeline: use the tensor on the current stream and drop it before the next call.
    """
    if device.type == "cuda":
        (output,) = pipeline.run(torch.cuda.current_stream(device))  # ordered on this stream, the host does not wait
    else:
        (output,) = pipeline.run()
    images: Tensor = torch.from_dlpack(output.as_tensor())
    return images


def normalise(images: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Mirror the chosen images, map [0, 255] to [-1, 1] (mean = std = 0.5) and cast.

    Args:
        images: uint8 [n, 3, H, W].
        flip: bool [n], the images to mirror; None mirrors none.
        dtype: of the result.

    Returns:
        [n, 3, H, W] of ``dtype``, in memory of its own.
    """
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
    # x - 127.5 has 8 significant bits and is exact in bf16, so the division's is the only rounding
    return images.to(dtype).sub_(127.5).div_(127.5)
