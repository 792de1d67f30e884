"""Evaluation sees every image once, with torchvision's geometry."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.evaluation import EvaluationLoader


def make_loader(index: DatasetIndex, **changes: Any) -> EvaluationLoader:
    """An evaluation of one rank."""
    arguments: dict[str, Any] = {
        "index": index,
        "config": DataConfig(),
        "image_size": 56,
        "resize_size": 64,
        "squash": False,
        "batch_size": 5,
        "data_rank": 0,
        "data_size": 1,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return EvaluationLoader(**(arguments | changes))


@pytest.mark.parametrize(("data_size", "batch_size"), [(1, 5), (2, 5), (3, 4), (4, 16), (37, 1), (50, 2)])
def test_every_image_once(photographs: Path, data_size: int, batch_size: int) -> None:
    """Over any number of ranks; each makes the same number of batches."""
    index = scan_folder(photographs)
    seen: list[int] = []
    batches = set()
    for rank in range(data_size):
        loader = make_loader(index, data_rank=rank, data_size=data_size, batch_size=batch_size)
        result = list(loader)
        batches.add(len(result))
        assert len(result) == len(loader)
        for batch in result:
            assert len(batch.images) == len(batch.labels) == len(batch.valid) == min(batch_size, -(-37 // data_size))
            assert (batch.labels.numpy() == index.label[batch.image_index.numpy()]).all()
            seen += batch.image_index[batch.valid].tolist()
    assert len(batches) == 1
    assert sorted(seen) == list(range(37))


@pytest.mark.parametrize("squash", [False, True])
def test_pixels_match_torchvision(photographs: Path, squash: bool) -> None:
    """Resize on the shorter side (or to a square), bicubic, then centre crop; and the same on every pass."""
    index = scan_folder(photographs)
    loader = make_loader(index, squash=squash)
    resize = transforms.Resize((64, 64) if squash else 64, transforms.InterpolationMode.BICUBIC)
    reference = transforms.Compose([resize, transforms.CenterCrop(56)])
    passes = []
    for _ in range(2):
        images = torch.cat([batch.images[batch.valid] for batch in loader])
        passes.append(images)
    assert torch.equal(*passes)
    differences = []
    for i in range(len(index)):
        with Image.open(index.where(i)) as image:
            expected = np.asarray(reference(image.convert("RGB")), np.float32).transpose(2, 0, 1)
        differences.append(np.abs((passes[0][i].numpy() + 1) * 127.5 - expected))
    assert np.mean(differences) <= 0.4
    assert np.max(differences) <= 16


def test_bad_images_are_named(photographs: Path, tmp_path: Path) -> None:
    """An evaluation that cannot see every image says which one."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    index = scan_folder(folder)
    victim = folder / "bee" / "04.jpg"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=f"{victim} cannot be decoded"):
        list(make_loader(index))
    victim.write_bytes(content[:300])
    with pytest.raises(ConfigError, match=f"{victim} cannot be read: damaged or cut short"):
        list(make_loader(index))
    victim.unlink()
    with pytest.raises(ConfigError, match=f"{victim} cannot be read: no such file"):
        list(make_loader(index))
    with pytest.raises(ConfigError, match="crop of 80 pixels is larger"):
        make_loader(index, image_size=80)
