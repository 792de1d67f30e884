"""Named tensors from safetensors files of other programs: whole, from exactly the files that are meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_nepa.config import ConfigError, require

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel and DeepSpeed, torch.compile, Lightning
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        ConfigError: where it is missing, damaged, or no safetensors, such as a pickle.
    """
    require(
        path.suffix not in _PICKLES,
        f"{path} is a pickle by its name, and reading one can run code: have its tensors saved with "
        "safetensors.torch.save_file.",
    )
    require(path.is_file(), f"{path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors, it may be cut short: {error}.") from None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors``, or of the files that its index names; of no other file.

    Raises:
        ConfigError: where there is neither or both, and naming a file or tensor that the index names in vain.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        parts = sorted(path.name for path in folder.glob("model-*.safetensors"))
        require(
            (folder / MODEL_FILE).is_file() or not parts,
            f"{folder} holds {parts[0] if parts else ''} but no {INDEX_FILE}, which says what belongs together.",
        )
        return read_safetensors(folder / MODEL_FILE)
    require(
        not (folder / MODEL_FILE).is_file(),
        f"{folder} holds both {MODEL_FILE} and {INDEX_FILE}: remove the one that is left over.",
    )
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
        if not all(isinstance(file, str) for file in places.values()):
            raise TypeError("a tensor's file is no name")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index} is no index of safetensors, with a weight_map: {error}.") from None
    state: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        require(Path(file).name == file, f"{index} names {file}, which lies in another folder.")
        require((folder / file).is_file(), f"{folder / file} is missing, which {INDEX_FILE} names.")
        found = read_safetensors(folder / file)
        named = {name for name, place in places.items() if place == file}
        lacking, extra = sorted(named - found.keys()), sorted(found.keys() - named)
        require(not lacking, f"{folder / file} lacks {', '.join(lacking[:1])}, which {INDEX_FILE} names in it.")
        require(not extra, f"{folder / file} holds {', '.join(extra[:1])}, of which {INDEX_FILE} says nothing.")
        state |= found
    return state


def unwrap(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers that the model was saved under ("module.", "_orig_mod.", "model.").

    Raises:
        ConfigError: where two tensors then have one name.
    """
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, value in state.items():
        bare = name.replace("._orig_mod.", ".")
        while bare.startswith(_WRAPPERS):
            bare = bare.partition(".")[2]
        require(
            bare not in result,
            f"{source} holds {origin.get(bare)} and {name}, which are both {bare} without a wrapper's prefix: "
            "remove the one that is left over.",
        )
        result[bare], origin[bare] = value, name
    return result
