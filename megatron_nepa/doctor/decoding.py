"""The image decoder against another one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_nepa.config import DataConfig
from megatron_nepa.data.decoding.crop_stream import CropStream
from megatron_nepa.data.decoding.pipelines import DecoderOptions
from megatron_nepa.data.index.builtin import photograph_files
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import crop_boxes, image_of_sample
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.doctor.report import Row

SIZE, COUNT, SEED = 112, 8, 0
# grey levels of 255: decoders round differently, and so do antialiasing filters
LARGEST_MEAN = 2.0


def check_decoding(device: torch.device) -> Iterator[Row]:
    """DALI's crops on the CPU against Pillow's; on a GPU, its mixed decoder against its CPU decoder."""
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder))
        on_cpu = crops(Path(folder), torch.device("cpu"))
        yield compare("DALI decoding on the CPU", on_cpu, pillow_crops(Path(folder)), "Pillow", "reinstall DALI.")
        if device.type == "cuda":
            found = crops(Path(folder), device).cpu()
            remedy = "take the DALI wheel of your driver's CUDA: extra cuda12 or cuda13."
            yield compare("DALI decoding on the GPU", found, on_cpu, "the CPU's", remedy)
        else:
            yield Row("DALI decoding on a GPU", "not checked", "needs a GPU")


def compare(name: str, found: Tensor, expected: Tensor, other: str, remedy: str) -> Row:
    """Whether two decoders' uint8 images differ little."""
    mean = float((found.float() - expected.float()).abs().mean())
    text = f"{COUNT} random crops differ from {other} by {mean:.2f} of 255 on average"
    return Row(name, "ok", text) if mean <= LARGEST_MEAN else Row(name, "failed", text, remedy)


def photographs(folder: Path) -> None:
    """Some JPEGs of photographs that come with the installed packages."""
    files = list(photograph_files())
    for number in range(COUNT):
        with Image.open(files[number % len(files)]) as image:
            image.convert("RGB").save(folder / f"{number}.jpg", quality=95)


def crops(folder: Path, device: torch.device) -> Tensor:
    """The first crops of a run, as training decodes them, uint8 [COUNT, 3, SIZE, SIZE]."""
    index, config = scan_folder(folder), DataConfig(num_threads=1)
    feed = Feed(Share(COUNT, COUNT, 1, 0, 1, 0, 1), SEED, device, torch.uint8)
    stream = CropStream(index, config, SIZE, feed, DecoderOptions.of(config, index, device))
    try:
        images: Tensor = next(stream)[0].clone()
    finally:
        stream.close()
    return images


def pillow_crops(folder: Path) -> Tensor:
    """The same crops cut and scaled by Pillow."""
    index, sample = scan_folder(folder), np.arange(COUNT)
    image = image_of_sample(SEED, sample, len(index))
    boxes = crop_boxes(SEED, sample, index.width[image], index.height[image], DataConfig().crop_scale_min)
    cut = []
    for number, (x, y, width, height) in zip(image, boxes, strict=True):
        with Image.open(index.where(int(number))) as photograph:
            crop = photograph.crop((x, y, x + width, y + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        cut.append(np.asarray(crop).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(cut))
