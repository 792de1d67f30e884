"""What the ranks of a grid are given of a run, put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.loaders.pretraining import PretrainingLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import IntArray
from megatron_nepa.data.sampling.rank_share import Share

SEED, SIZE, GLOBAL = 11, 48, 8


@dataclass(frozen=True)
class Grid:
    """Replicas of tensor-parallel ranks, and their micro-batch."""

    data_size: int = 1
    tensor_size: int = 1
    micro: int = GLOBAL


# replicas, accumulation, tensor-parallel ranks that share a micro-batch out (8 over 2 and 4) and that do not (1 over 2)
GRIDS = (Grid(micro=4), Grid(2, 1, 4), Grid(4, 1, 1), Grid(1, 2, 8), Grid(1, 2, 1), Grid(2, 2, 2), Grid(1, 4, 8))


def seen_on(grid: Grid, index: DatasetIndex | Mixture, steps: int, consumed: int = 0) -> tuple[Tensor, IntArray]:
    """Pixels [n, 3, SIZE, SIZE] and image numbers [n] of the samples that follow on ``consumed``.

    Every sample that a rank is given must be the one that is its due; those that several ranks are given, the same.
    """
    accumulation = GLOBAL // (grid.micro * grid.data_size)
    pixels, images = torch.full((steps * GLOBAL, 3, SIZE, SIZE), torch.nan), np.full(steps * GLOBAL, -1)
    for data_rank in range(grid.data_size):
        for tensor_rank in range(grid.tensor_size):
            share = Share(grid.micro, GLOBAL, accumulation, data_rank, grid.data_size, tensor_rank, grid.tensor_size)
            feed = Feed(share, SEED, torch.device("cpu"), torch.float32, consumed)
            loader = PretrainingLoader(index, DataConfig(horizontal_flip=True), SIZE, feed)
            for number, batch in enumerate(islice(loader, steps * accumulation)):
                step, m = divmod(number, accumulation)
                first = consumed + step * GLOBAL + (m * grid.data_size + data_rank) * grid.micro
                assert batch.sample_index.dtype == torch.int64
                assert batch.sample_index.tolist() == list(range(first, first + grid.micro))
                local = batch.sample_index.numpy() - consumed
                if grid.micro % grid.tensor_size == 0:
                    size = grid.micro // grid.tensor_size
                    local = local[tensor_rank * size : (tensor_rank + 1) * size]
                assert len(batch.images) == len(local)
                assert batch.image_index is not None
                known = images[local] >= 0
                assert torch.equal(pixels[local][known], batch.images[known])
                pixels[local], images[local] = batch.images, batch.image_index
            loader.close()
    return pixels, images


def check_grids(grids: Iterable[Grid], index: DatasetIndex, pixels: Tensor, images: IntArray, steps: int) -> None:
    """Assert that each grid is given the samples of one rank, ``pixels`` and ``images`` of sample 0 on.

    Every grid goes on from a step of its own, as after a restart.
    """
    for number, grid in enumerate(grids):
        consumed = number % 4 * GLOBAL
        found_pixels, found_images = seen_on(grid, index, steps, consumed)
        expected = slice(consumed, consumed + steps * GLOBAL)
        assert np.array_equal(found_images, images[expected])
        assert torch.equal(found_pixels, pixels[expected])
