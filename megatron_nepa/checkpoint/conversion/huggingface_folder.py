"""Reading a folder for Hugging Face transformers back; no code of the folder is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_nepa.checkpoint.conversion.huggingface_config import MODEL_TYPE, model_from_huggingface
from megatron_nepa.checkpoint.format.huggingface_names import TOKENS, huggingface_names
from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN
from megatron_nepa.checkpoint.format.renaming import rename_back
from megatron_nepa.checkpoint.reading.tensor_files import read_folder, unwrap
from megatron_nepa.checkpoint.reading.weights import Weights, trunk_layouts
from megatron_nepa.config import ConfigError, require

CONFIG_FILE = "config.json"
_STATISTICS = ("running_mean", "running_var")  # of a segmenter's BatchNorm


def is_huggingface(path: Path) -> bool:
    """Whether a folder is one that ``convert_checkpoint.py to_hf``, or transformers from such a one, wrote."""
    if not (path / CONFIG_FILE).is_file():
        return False
    try:
        return bool(read_config(path).get("model_type") == MODEL_TYPE)
    except ConfigError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json.

    Raises:
        ConfigError: where it is no JSON object.
    """
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} is no JSON: {error}.") from None
    require(isinstance(values, dict), f"{folder / CONFIG_FILE} describes no model: it is no JSON object.")
    return dict(values)


def read_huggingface(folder: Path) -> Weights:
    """The weights of such a folder, bit for bit.

    Raises:
        ConfigError: where it is of another kind, or its weights do not fit its config.
    """
    require(
        (folder / CONFIG_FILE).is_file(),
        f"{folder} holds no model for transformers: it needs {CONFIG_FILE} and model.safetensors.",
    )
    model = model_from_huggingface(read_config(folder))
    state = unwrap(read_folder(folder), folder)
    if not any(name.startswith("nepa.") for name in state):  # of NepaModel.save_pretrained
        state = {f"nepa.{name}": value for name, value in state.items()}
    for name in state:
        if name.endswith(TOKENS):
            state[name] = state[name].squeeze(0)
    stored = rename_back(state, huggingface_names(model, state))
    tensors = {name: _shaped(name, value) for name, value in stored.items()}
    misfits = [
        f"{name} is {tuple(tensors[name].shape)} in the file, {tuple(form.shape)} by {CONFIG_FILE}"
        for name, form in trunk_layouts(model, MASK_TOKEN in tensors).items()
        if tensors[name].shape != form.shape
    ]
    require(not misfits, f"{folder} contradicts itself: {'; '.join(misfits[:1])}.")
    dtypes = {name: value.dtype for name, value in stored.items()}
    buffers = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_STATISTICS)}
    return Weights(model, tensors, f"weights of the folder {folder}", buffers, dtypes)


def _shaped(name: str, value: Tensor) -> Tensor:
    is_token = name.endswith(("bos_token", "mask_token"))
    return (value.flatten() if is_token else value).float()
