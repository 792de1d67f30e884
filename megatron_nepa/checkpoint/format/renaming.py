"""Tensors of this project's names as those of another format: renamed, and fused projections split into their parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_nepa.config import ConfigError, ModelConfig

# a name of ours to those of the other format; several mean that ours is their concatenation along dimension 0
Names = Mapping[str, list[str]]
_MISFIT = "the weights do not fit their config"
_MOST_NAMES = 4  # of tensors in a message


def rename(state: Mapping[str, Tensor], names: Names, misfit: str = _MISFIT) -> dict[str, Tensor]:
    """Our tensors under the other format's names.

    Args:
        state: exactly the tensors that ``names`` has.
        names: of the format.
        misfit: what to say before the tensors that are missing or left over.

    Raises:
        ConfigError: listing the tensors that are missing or left over.
    """
    _require_same(set(names), set(state), misfit)
    renamed = {}
    for name, parts in names.items():
        pieces = state[name].chunk(len(parts))
        renamed.update({part: piece.contiguous() for part, piece in zip(parts, pieces, strict=True)})
    return renamed


def rename_back(state: Mapping[str, Tensor], names: Names, misfit: str = _MISFIT) -> dict[str, Tensor]:
    """The inverse of :func:`rename`.

    Args:
        state: exactly the other format's tensors that ``names`` has.
        names: of the format.
        misfit: as of :func:`rename`.

    Raises:
        ConfigError: listing the tensors that are missing or left over.
    """
    _require_same({part for parts in names.values() for part in parts}, set(state), misfit)
    return {
        name: state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        for name, parts in names.items()
    }


def block_names(
    config: ModelConfig, theirs: str, modules: Mapping[str, list[str]], single: Mapping[str, str]
) -> dict[str, list[str]]:
    """Our names of all blocks' parameters to the other format's.

    Args:
        config: the model's shape.
        theirs: what a block's names begin with there, with ``{}`` for its number.
        modules: of a block, which have a weight and a bias: ours to theirs, of which ours is the concatenation.
        single: the parameters ``attention.q_norm``, ``attention.k_norm``, ``layer_scale1`` and ``layer_scale2``, which
            not every model has.
    """
    names = {}
    for i in range(config.num_layers):
        own, other = f"trunk.blocks.{i}.", theirs.format(i)
        for module, parts in modules.items():
            for kind in ("weight", "bias"):
                names[f"{own}{module}.{kind}"] = [f"{other}{part}.{kind}" for part in parts]
        for name, part in single.items():
            if config.qk_norm == "affine" if name.endswith("_norm") else config.layer_scale_init is not None:
                names[f"{own}{name}"] = [f"{other}{part}"]
    return names


def _require_same(wanted: set[str], found: set[str], misfit: str) -> None:
    missing, left_over = sorted(wanted - found), sorted(found - wanted)
    if missing or left_over:
        raise ConfigError(f"{misfit}: missing {_listed(missing)}, left over {_listed(left_over)}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{names[:_MOST_NAMES]}{more}" if names else "nothing"
