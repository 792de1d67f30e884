"""``--init_from``: a run whose first weights are a checkpoint's or a release's, with a fresh optimizer at step 0.

The trunk must be the checkpoint's, but for the patch and image size, to which its patch embedding and learned positions
are resampled. Whatever lies outside it is the head of a task, and may be new, or left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_nepa.checkpoint.conversion.huggingface_folder import is_huggingface, read_huggingface
from megatron_nepa.checkpoint.conversion.release_folder import read_release
from megatron_nepa.checkpoint.described import holds_weights_alone
from megatron_nepa.checkpoint.format.state import TrainState, empty_weights, restore_weights
from megatron_nepa.checkpoint.format.torch_checkpoint import load_shares
from megatron_nepa.checkpoint.reading.resume import find_checkpoint, find_intact
from megatron_nepa.checkpoint.reading.weights import (
    Choice,
    choose_kind,
    describe_origin,
    names_of,
    read_consolidated,
    stored_tensors,
)
from megatron_nepa.config import ModelConfig, require
from megatron_nepa.data.index.agreement import compare_with_head
from megatron_nepa.models.resampling import resample_patch_kernel, resample_positions
from megatron_nepa.parallel.parameters import REPLICATED, layout_of

# parameters of a trunk that a run may have without their being in the checkpoint: they keep their initial values
_OPTIONAL = ("mask_token", "q_norm", "k_norm")
# what makes two trunks different models; LayerScale is by whether there is one
_STRUCTURE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp",
    "mlp_hidden_size",
    "qk_norm",
    "position_embedding",
    "bos_token",
)
_LAYER_SCALE = "layer_scale_init"
# settings of training that every start chooses anew: they change nothing that the weights compute
_UNTOUCHED = (
    "drop_path",
    "freeze_patch_embedding",
    "init_std",
    "layer_scale_init",
    "rope_rescale",
    "rope_rescale_group",
)

_MOST_NAMED = 4  # tensors in a message


def start_from(
    train: TrainState,
    path: str,
    choice: Choice | None,
    model: ModelConfig,
    reset_head: bool = False,
    require_head: bool = False,
    classes: Sequence[str] | None = None,
) -> str:
    """Set the weights, and the average where the run keeps one; every rank calls it, on any grid.

    Args:
        train: a fresh run, of pre-training or of any task with a head.
        path: a checkpoint, an OUTPUT_DIR, what ``convert_checkpoint.py from_release`` wrote, or a released model's
            folder (config.json with model.safetensors or pytorch_model_ema.bin), or a file of ``consolidate``.
        choice: the average or the raw weights, where there are both; None takes the average where there is one.
        model: this run's model.
        reset_head: leave the head at its initial values, whatever the checkpoint holds.
        require_head: refuse a checkpoint without a head, as an evaluation must.
        classes: names of what the run's head tells apart, by number, which are those of a head that is taken; () where
            they are numbers alone, None where that was seen to elsewhere.

    Returns:
        What was done, for the log.

    Raises:
        ConfigError: where the checkpoint is damaged, its trunk is another one, or its head does not fit or is of other
            classes.
    """
    wanted = empty_weights(train)
    read = _of_weights if holds_weights_alone(path) else _of_checkpoint
    source = read(train, path, choice)
    adapters = _adapters(source.model, model)
    _require_same_trunk(source, wanted, model, adapters)
    taken = {
        name: value for name, value in wanted.items() if name in source.shapes and (_is_trunk(name) or not reset_head)
    }
    misfits = _misfits(source, {name: value for name, value in taken.items() if name not in adapters})
    require(
        not misfits,
        f"--init_from {path} holds another head: {'; '.join(misfits)}; "
        + ("evaluate it on its own classes." if require_head else "give --reset_head to draw this one anew."),
    )
    takes_head = any(not _is_trunk(name) for name in taken)
    unnamed = None
    if takes_head and classes is not None:
        remedy = "give --reset_head to draw the head anew, or label the images as those were"
        unnamed = compare_with_head(f"the head of {path}", source.classes, classes, "the training images", remedy)
    initial = [name for name in wanted if name not in taken]
    untrained = [name for name in initial if not _is_trunk(name)]
    require(
        not (require_head and untrained),
        f"{path} holds a trunk but not this model's head ({_summary(untrained)}): train the head first, or give the "
        "checkpoint of one that was trained.",
    )
    as_stored = {name: torch.empty(source.shapes[name]) for name in adapters}
    source.read_into({**taken, **as_stored})
    restore_weights(train, {**taken, **{name: adapt(as_stored[name]) for name, adapt in adapters.items()}})

    lines = [f"starting from the {source.origin}"]
    lines += [f"  {unnamed}"] if unnamed else []
    left_out = sorted(name for name in source.shapes if name not in wanted and not _is_trunk(name))
    if initial:
        lines.append(f"  at their initial values: {_summary(initial)}")
    if adapters:
        lines.append(f"  resampled to this patch and image size: {', '.join(adapters)}")
    if left_out:
        lines.append(f"  left out, of a head that this model does not have: {_summary(left_out)}")
    ours = asdict(model)
    differing = [
        f"model.{key} {value} there, {ours.get(key)} here"
        for key, value in sorted(source.model.items())
        if value != ours.get(key) and key not in _UNTOUCHED
    ]
    if differing:
        lines.append(f"  its model differs: {'; '.join(differing)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Source:
    """Weights to start from.

    Attributes:
        path: the path as the user gave it.
        origin: what they are, in words.
        model: config of their model, as plain values.
        classes: that its head tells apart, by number; None where they are not known.
        shapes: of the whole tensors, as a checkpoint stores them, by the names of parameters and buffers.
        read_into: fills tensors of :func:`empty_weights`, by name.
    """

    path: str
    origin: str
    model: dict[str, Any]
    classes: list[str] | None
    shapes: dict[str, tuple[int, ...]]
    read_into: Callable[[dict[str, Tensor]], None]


def _of_checkpoint(train: TrainState, path: str, choice: Choice | None) -> _Source:
    checkpoint = find_checkpoint(path)
    manifest = find_intact([checkpoint], train.topology, "restore it, or give another as --init_from").manifest
    stored = stored_tensors(checkpoint)
    wanted = [name for name, _ in train.module.named_parameters()]
    require(
        bool(_trunk_names(names_of("master", stored))) or not _trunk_names(wanted),  # a probe's model is its head alone
        f"--init_from {path} holds no trunk, like a linear probe's checkpoint: give the trunk's own.",
    )
    kind = choose_kind(checkpoint, manifest, choice, "--init_weights")
    # a frozen parameter has no average: it is its own
    keys = {name: f"master.{name}" for name in names_of("master", stored)}
    keys |= {name: f"{kind}.{name}" for name in names_of(kind, stored)}
    keys |= {name: f"buffer.{name}" for name in names_of("buffer", stored)}

    def read_into(weights: dict[str, Tensor]) -> None:
        state = {keys[name]: value for name, value in weights.items()}
        load_shares(state, checkpoint, train.topology.host_group)

    shapes = {name: tuple(stored[key].shape) for name, key in keys.items()}
    run = manifest["run"]
    origin = describe_origin(checkpoint, manifest, kind)
    return _Source(path, origin, run["model"], run.get("classes"), shapes, read_into)


def _of_weights(train: TrainState, path: str, choice: Choice | None) -> _Source:
    # as of a conversion, where there is one kind only it is that one
    notes: list[str] = []
    if Path(path).is_file():
        weights = read_consolidated(Path(path))
    elif is_huggingface(Path(path)):
        weights = read_huggingface(Path(path))
    else:
        weights, notes = read_release(Path(path), "raw" if choice == "raw" else None)
    layouts = {name: layout_of(param) for name, param in train.module.named_parameters()}
    stored = {**weights.tensors, **weights.buffers}

    def read_into(targets: dict[str, Tensor]) -> None:
        for name, target in targets.items():
            local = target.to_local() if isinstance(target, DTensor) else target
            local.copy_(layouts.get(name, REPLICATED).take_shard(stored[name], train.topology.tensor).view(local.shape))

    shapes = {}
    for name, value in stored.items():
        sections = layouts[name].sections if name in layouts else 1
        shapes[name] = (sections, value.shape[0] // sections, *value.shape[1:]) if sections > 1 else tuple(value.shape)
    return _Source(path, "; ".join([weights.origin, *notes]), asdict(weights.model), None, shapes, read_into)


def _adapters(theirs: dict[str, Any], ours: ModelConfig) -> dict[str, Callable[[Tensor], Tensor]]:
    """How the parameters that have another shape for another patch or image size become ours, by name."""
    adapters: dict[str, Callable[[Tensor], Tensor]] = {}
    if theirs["patch_size"] != ours.patch_size and theirs["hidden_size"] == ours.hidden_size:
        adapters["trunk.embedding.weight"] = partial(resample_patch_kernel, patch_size=ours.patch_size)
    grid = theirs["image_size"] // theirs["patch_size"]
    same_positions = theirs["position_embedding"] == ours.position_embedding != "none"
    same_tokens = (theirs["hidden_size"], theirs["bos_token"]) == (ours.hidden_size, ours.bos_token)
    if same_positions and same_tokens and grid != ours.grid_size:
        adapters["trunk.embedding.positions"] = partial(resample_positions, old_grid=grid, new_grid=ours.grid_size)
    return adapters


def _require_same_trunk(
    source: _Source, wanted: dict[str, Tensor], model: ModelConfig, adapters: Iterable[str]
) -> None:
    ours, theirs = ([name for name in _trunk_names(names) if name not in adapters] for names in (wanted, source.shapes))
    problems = [f"{name} missing there" for name in ours if name not in theirs and not name.endswith(_OPTIONAL)]
    problems += [f"{name} left over there" for name in theirs if name not in ours and not name.endswith("mask_token")]
    problems += _misfits(source, {name: wanted[name] for name in ours if name in theirs})
    here, there = _structure(asdict(model)), _structure(source.model)
    differing = [
        f"{key} {there[key]} there, {value} here" for key, value in here.items() if there.get(key, value) != value
    ]
    fields = [_LAYER_SCALE if key == "layer_scale" else key for key, value in here.items() if there[key] != value]
    flags = " ".join(f"--model.{field} {str(source.model.get(field)).lower()}" for field in fields)
    remedy = f"give {flags}, or another checkpoint" if flags else "give another checkpoint"
    require(
        bool(_trunk_names(wanted)) or not _trunk_names(source.shapes),
        f"--init_from {source.path} holds a trunk, not the layer of a probe: give a probe's checkpoint.",
    )
    require(
        not problems and source.model["num_heads"] == model.num_heads,
        f"--init_from {source.path} holds another trunk: {'; '.join(differing or problems[:_MOST_NAMED])}; {remedy}.",
    )


def _structure(model: dict[str, Any]) -> dict[str, Any]:
    values = {key: model[key] for key in _STRUCTURE}
    values["layer_scale"] = "absent" if model[_LAYER_SCALE] is None else "present"
    return values


def _trunk_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if _is_trunk(name)]


def _is_trunk(name: str) -> bool:
    return name.startswith("trunk.")


def _misfits(source: _Source, weights: dict[str, Tensor]) -> list[str]:
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return [
        f"{name} is {source.shapes[name]} there, {shape} here"
        for name, shape in shapes.items()
        if source.shapes[name] != shape
    ]


def _summary(names: list[str]) -> str:
    """The trunk's parameters one by one, a head's modules by their number of tensors."""
    modules = Counter(name.partition(".")[0] for name in names if not _is_trunk(name))
    return ", ".join(_trunk_names(names) + [f"{module}.* ({count} tensors)" for module, count in modules.items()])
