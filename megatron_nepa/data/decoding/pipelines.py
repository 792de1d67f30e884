"""What decoding pipelines share.

DALI hands out uint8 (it has no bfloat16, and a byte halves what leaves it); flip, normalisation and cast follow on the
training device. With a GPU the JPEGs are decoded there and no pixel passes through the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from nvidia.dali import Pipeline, types
from torch import Tensor

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.mixture import Mixture, sets_of

Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
UNTIMED_THREADS, UNTIMED_LOAD = 2, 0.65  # where a config leaves them open and nothing is timed
PREFETCH = 2  # batches decoded ahead: depth 1 to 4 measured within noise, and each batch costs memory


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
    def of(cls, config: DataConfig, index: DatasetIndex | Mixture, device: torch.device) -> DecoderOptions:
        """The options of ``config``, with size hints from the images of ``index``."""
        # not the largest: one panorama would reserve its size for every image in flight
        hints = [[np.percentile(side[:1_000_000], 99.9) for side in (one.width, one.height)] for one in sets_of(index)]
        width, height = (int(max(sides)) for sides in zip(*hints, strict=True))
        load = UNTIMED_LOAD if config.hw_decoder_load is None else config.hw_decoder_load
        if torch.are_deterministic_algorithms_enabled():
            load = float(round(load))  # one decoder for all: which images a split gives to which is not known to repeat
        return cls(device, config.num_threads or UNTIMED_THREADS, load, width, height)

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


class ImagePipeline(Protocol):
    """Gives batches of decoded images, one after the other."""

    def next_images(self) -> Tensor:
        """The next batch, uint8 [n, 3, H, W]: use it on the current stream, and drop it before the next call.

        Raises:
            RuntimeError: an image cannot be decoded. The pipeline is dead then.
        """
        ...

    def close(self) -> None:
        """Free the decoder and its threads."""
        ...


class DaliImages:
    """An :class:`ImagePipeline` whose batches are a DALI pipeline's output, without a copy.

    Args:
        pipeline: a built one, whose only output is images of equal size.
        device: where the pipeline puts its images.
    """

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self._pipeline, self._device = pipeline, device

    def next_images(self) -> Tensor:
        """The next batch; its memory is DALI's."""
        if self._device.type == "cuda":  # ordered on this stream, the host does not wait
            (output,) = self._pipeline.run(torch.cuda.current_stream(self._device))
        else:
            (output,) = self._pipeline.run()
        images: Tensor = torch.from_dlpack(output.as_tensor())
        return images

    def close(self) -> None:
        """Free the decoder and its threads."""
        del self._pipeline
