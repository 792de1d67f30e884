"""Resizing on a CPU by torch's antialiased uint8 kernel: four times as fast as DALI's and nearer to PIL's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import Pipeline
from torch import Tensor


class ThreadedResize:
    """An ImagePipeline that resizes decoded images to squares in threads, one batch ahead of the one that is asked for.

    Args:
        pipeline: a built one, whose only output is n images of any size, uint8 [H, W, 3].
        image_size: side S of the squares.
        interpolation: torch's name of it; antialiased.
        threads: number of threads that resize.
    """

    def __init__(self, pipeline: Pipeline, image_size: int, interpolation: str, threads: int) -> None:
        self._pipeline, self._size, self._interpolation = pipeline, (image_size, image_size), interpolation
        self._pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="image-resizer")  # one of them waits for images
        self._next = self._pool.submit(self._run)

    def next_images(self) -> Tensor:
        """The next batch, uint8 [n, 3, S, S]."""
        images = self._next.result()
        self._next = self._pool.submit(self._run)
        return images

    def close(self) -> None:
        """Free the decoder and all threads."""
        self._pool.shutdown(cancel_futures=True)
        del self._pipeline

    def _run(self) -> Tensor:
        (decoded,) = self._pipeline.run()
        pixels = np.empty((len(decoded), 3, *self._size), np.uint8)

        def resize(i: int) -> None:
            image = torch.from_dlpack(decoded[i]).permute(2, 0, 1)  # [3, H, W], channels last in memory
            resized = F.interpolate(image[None], self._size, mode=self._interpolation, antialias=True)[0]
            # numpy copies: torch would start a team of OpenMP threads in each of these
            np.copyto(pixels[i], resized.numpy())

        list(self._pool.map(resize, range(len(pixels))))
        return torch.from_numpy(pixels)
