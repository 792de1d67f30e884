"""A model from whatever this project or the authors' release wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_nepa.checkpoint.conversion.compare import read_any
from megatron_nepa.checkpoint.described import describe_checkpoint
from megatron_nepa.checkpoint.reading.modules import at_image_size, build_module
from megatron_nepa.checkpoint.reading.weights import Choice
from megatron_nepa.config import ConfigError, require
from megatron_nepa.library.model import NepaModel
from megatron_nepa.models.segmenter import Segmenter


def load(
    path: str | Path,
    weights: Choice | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    causal: bool | None = None,
    image_size: int | None = None,
) -> NepaModel:
    """A trained model as a plain ``nn.Module``, in evaluation mode.

    It needs no process group, no DeepSpeed and no DALI, and runs no code that the folder may hold.

    Args:
        path: the folder of a run (its newest checkpoint is taken), one checkpoint, a released model's folder, a folder
            for Hugging Face transformers that ``convert_checkpoint.py to_hf`` wrote, or a file of ``consolidate``.
        weights: ``"ema"``, the weight average, or ``"raw"``; None takes the average where there is one.
        device: where the model lies.
        dtype: of its parameters; images are cast to it.
        causal: whether a patch sees only those before it; None keeps what the model was trained with.
        image_size: side of the square images that it will mostly see, in pixels; None keeps the model's. Learned
            positions are resampled to it once, instead of in every call.

    Raises:
        ConfigError: where an argument is not as above, ``path`` is nothing of that kind or damaged, holds no trunk or
            no such weights, or its weights do not fit their config; the message says which.
    """
    folder = Path(path)
    require(folder.exists(), f"{folder} does not exist: give a run's folder, a checkpoint or an exported model.")
    require(weights in (None, "ema", "raw"), f"weights is {weights!r}: take 'ema', 'raw' or None.")
    require(
        isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        f"dtype is {dtype!r}: give one of torch's for real numbers, such as torch.float32 or torch.bfloat16.",
    )
    require(causal in (None, True, False), f"causal is {causal!r}: take True, False or None.")
    require(
        image_size is None or isinstance(image_size, int),
        f"image_size is {image_size!r}: give the side of a square in pixels, as one whole number.",
    )
    place = _usable(device)
    found = read_any(folder, weights)
    model = replace(found.model, drop_path=0.0, rope_rescale=None)  # draws of this project's trainer
    if causal is not None:
        model = replace(model, causal=causal)
    found = at_image_size(replace(found, model=model), image_size)
    module = build_module(found).to(place, dtype)
    described = describe_checkpoint(str(folder))

    def new_transform() -> Any:
        from megatron_nepa.library.preprocess import evaluation_transform  # torchvision takes a second to import

        return evaluation_transform(described, found.model.image_size, keeps_shape=isinstance(module, Segmenter))

    stride = described.settings.get("evaluation.stride")
    return NepaModel(module, found.origin, described.classes, new_transform, stride)


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"{device} is no device of torch: give cpu, cuda or cuda:N.") from None
    visible = torch.cuda.device_count()
    require(
        found.type != "cuda" or (found.index or 0) < visible,
        f"{found} is asked for and {visible} GPUs are visible: give another device, or cpu.",
    )
    return found
