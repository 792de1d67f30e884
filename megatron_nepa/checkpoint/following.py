"""A run takes the shape of its trunk from the checkpoint that it names, whichever recipe it is of.

What is followed depends on what becomes of the weights. Where they are trained on, the run takes what they can only be
read with, and the image size; what a recipe trains with (DropPath, causality, a segmenter's crops) stays its own. Where
they are not trained, as in a probe or an evaluation, everything that changes their outputs is followed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_nepa.checkpoint.described import Described, describe_checkpoint, values_of
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore
from megatron_nepa.config import ConfigError, RunConfig, flag_of, multiples_around, require
from megatron_nepa.config.modes import Values

# what weights of another shape would have another value of: a flag cannot change it
_SHAPE = (
    *("model.hidden_size", "model.num_layers", "model.num_heads", "model.mlp", "model.mlp_hidden_size"),
    *("model.qk_norm", "model.position_embedding", "model.bos_token"),
)
_SCALE = "model.layer_scale_init"
# what a flag can change: the weights are resampled to another patch and image size, or mean something else
_MEANING = ("model.rope", "model.rope_theta", "model.layer_norm_eps", "model.patch_size")
_IMAGE = "model.image_size"
_OUTPUTS = ("model.causal", "model.residual_dtype")
# how a trained head was evaluated; a task has some of them
_EVALUATION = (
    *("dtype", "head.pooling", "head.num_classes", "evaluation.resize_size", "evaluation.squash"),
    *("evaluation.inference", "evaluation.stride", "masks.num_classes", "masks.reduce_zero_label"),
    *("crops.shorter_side", "crops.longer_side", "trunk.weights", "trunk.block", "trunk.pooling"),
)
# pixels that a recipe says for its own image size
_SIZES = ("evaluation.resize_size", "evaluation.stride", "crops.shorter_side", "crops.longer_side")


class Named(NamedTuple):
    """A checkpoint that a run names, and what it is for.

    Attributes:
        path: of the checkpoint.
        flag: that names it.
        is_trained: whether the run trains its weights.
    """

    path: str
    flag: str
    is_trained: bool


def follow_checkpoint(run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a run takes from the checkpoint that it names, as "section.field" to value.

    Args:
        run: its recipe.
        given: fields that flags set: they stay as they are, and one that contradicts the weights is refused.

    Raises:
        ConfigError: where the checkpoint cannot be read, or a flag asks for another trunk than it holds.
    """
    recipe = run.fields_by_name()
    asked = Values({**recipe, **given})
    followed: dict[str, Any] = {}
    source = _trunk_source(asked)
    if source is not None:
        found = describe_checkpoint(source.path)
        _refuse_contradictions(source, found, asked, given)
        followed = _of_trunk(source, found, asked, given)
        if not source.is_trained and "dtype" in found.settings:
            followed["dtype"] = found.settings["dtype"]
        new, old = followed.get(_IMAGE, asked[_IMAGE]), recipe[_IMAGE]
        if _IMAGE in followed and new != old:
            followed |= {name: round(recipe[name] * new / old) for name in _SIZES if recipe.get(name) is not None}
    if asked["evaluation.only"]:
        settings = describe_checkpoint(_evaluated(asked)).settings
        followed |= {name: settings[name] for name in _EVALUATION if name in settings}
    return {name: value for name, value in followed.items() if name in recipe and name not in given}


def _trunk_source(asked: Values) -> Named | None:
    if asked["trunk.path"] is not None:
        return Named(asked["trunk.path"], "--trunk", is_trained=False)
    if "trunk.path" in asked:  # a probe, which will ask for its trunk
        return None
    if asked["evaluation.only"]:
        return Named(_evaluated(asked), "--init_from" if asked["init_from"] else "--output_dir", is_trained=False)
    if asked["init_from"] is None:
        return None
    return Named(_continued(asked) or asked["init_from"], "--init_from", is_trained=True)


def _evaluated(asked: Values) -> str:
    if asked["init_from"] is not None:
        return str(asked["init_from"])
    best = CheckpointStore.of(Path(asked["output_dir"])).best()
    return str(best or find_checkpoint(asked["output_dir"]))


def _continued(asked: Values) -> str | None:
    """The checkpoint of this run's own that it goes on with: what it once started from may be gone."""
    return newest_described(asked["output_dir"]) if asked["resume"] == "auto" else None


def newest_described(output_dir: str) -> str | None:
    """The newest checkpoint of a run's folder that says what it holds: a damaged one is passed over."""
    for checkpoint in CheckpointStore.of(Path(output_dir)).newest_first():
        with contextlib.suppress(ConfigError):
            describe_checkpoint(str(checkpoint))
            return str(checkpoint)
    return None


def _of_trunk(source: Named, found: Described, asked: Values, given: Mapping[str, Any]) -> dict[str, Any]:
    theirs = values_of(found.model)
    followed = {name: theirs[name] for name in (*_SHAPE, *_MEANING)}
    if (theirs[_SCALE] is None) != (asked[_SCALE] is None):
        followed[_SCALE] = theirs[_SCALE]
    if not source.is_trained:
        return {**followed, _IMAGE: theirs[_IMAGE], **{name: theirs[name] for name in _OUTPUTS}}
    if _gains_affine_norm(theirs, asked):
        del followed["model.qk_norm"]
    if "crops.shorter_side" not in asked:
        return {**followed, _IMAGE: theirs[_IMAGE]}
    # a segmenter's crop is its recipe's, as near as the patch divides it
    side, patch = asked[_IMAGE], given.get("model.patch_size", theirs["model.patch_size"])
    if side % patch and "model.patch_size" not in given:
        followed[_IMAGE] = min(multiples_around(side, patch), key=lambda size: abs(size - side))
    return followed


def _gains_affine_norm(theirs: Mapping[str, Any], asked: Values) -> bool:
    """Whether a run trains weights of a QK-norm that had none: they start as ones, which changes nothing."""
    return bool(theirs["model.qk_norm"] == "plain" and asked["model.qk_norm"] == "affine")


def _refuse_contradictions(source: Named, found: Described, asked: Values, given: Mapping[str, Any]) -> None:
    theirs = values_of(found.model)
    wrong = [name for name in _SHAPE if name in given and given[name] != theirs[name]]
    if source.is_trained and _gains_affine_norm(theirs, asked):
        wrong = [name for name in wrong if name != "model.qk_norm"]
    if _SCALE in given and (given[_SCALE] is None) != (theirs[_SCALE] is None):
        wrong.append(_SCALE)
    facts = [f"{flag_of(name)} {_said(given[name])}, not {_said(theirs[name])}" for name in wrong]
    them = "it" if len(wrong) == 1 else "them"
    other = "" if source.flag == "--output_dir" else f", or drop {source.flag} to draw a trunk of that shape"
    if not source.is_trained:
        other = f", or give another checkpoint as {source.flag}"
    require(
        not wrong,
        f"{', '.join(facts)} as in {source.path}: a checkpoint knows the shape of its trunk; drop {them}{other}.",
    )


def _said(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
