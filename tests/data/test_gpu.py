"""The same input decoded on a GPU."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvidia.dali")

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.evaluation import EvaluationLoader
from megatron_nepa.data.loaders.pretraining import Batch, PretrainingLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def take(folder: Path, device: str, count: int, **arguments: Any) -> list[Batch]:
    """Some micro-batches decoded on ``device``."""
    index = arguments.pop("index", None) or scan_folder(folder)
    config = DataConfig(horizontal_flip=True)
    share = Share(8, 8, 1, 0, 1, 0, 1)
    loader = PretrainingLoader(index, config, 48, Feed(share, 1, torch.device(device), torch.float32))
    batches = list(islice(loader, count))
    loader.close()
    return batches


def test_a_gpu_sees_the_same_crops(photographs: Path) -> None:
    """Same samples, boxes and flips; pixels within about a grey level of the CPU's."""
    for here, there in zip(take(photographs, "cuda", 5), take(photographs, "cpu", 5), strict=True):
        assert here.images.is_cuda
        assert here.sample_index.is_cuda
        assert torch.equal(here.sample_index.cpu(), there.sample_index)
        difference = (here.images.cpu() - there.images).abs() * 127.5
        assert difference.mean() < 1.0
        assert difference.amax() < 32


def test_a_batch_costs_no_wait_of_the_host(photographs: Path) -> None:
    """No synchronisation in flip, normalisation and sample numbers."""
    loader = PretrainingLoader(
        scan_folder(photographs),
        DataConfig(horizontal_flip=True),
        48,
        Feed(Share(8, 8, 1, 0, 1, 0, 1), 1, torch.device("cuda"), torch.bfloat16),
    )
    next(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()


def test_bad_images_are_replaced_on_a_gpu(photographs: Path, tmp_path: Path) -> None:
    """The GPU's decoder refuses a file that lost its pixels, and the run goes on as it does on a CPU."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    index = scan_folder(folder)
    victim = folder / "bee" / "04.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    for here, there in zip(take(folder, "cuda", 5, index=index), take(folder, "cpu", 5, index=index), strict=True):
        assert ((here.images.cpu() - there.images).abs() * 127.5).mean() < 1.0


def test_evaluation_on_a_gpu(photographs: Path) -> None:
    """Resized and cropped as on a CPU."""
    index = scan_folder(photographs)
    both = [
        EvaluationLoader(index, DataConfig(), 56, 64, False, 8, 0, 1, torch.device(device), torch.float32)
        for device in ("cuda", "cpu")
    ]
    for here, there in zip(*both, strict=True):
        assert torch.equal(here.labels.cpu(), there.labels)
        assert ((here.images.cpu() - there.images).abs() * 127.5).mean() < 1.0
