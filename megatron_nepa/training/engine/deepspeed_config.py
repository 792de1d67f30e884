"""The DeepSpeed config of a run: the user's file, with "auto" filled in and every contradiction named."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nepa.config import ConfigError, Run, RunConfig, override, require

# what a run without --ds_config uses: ds_configs/zero2.json; the README beside that gives the reason for each value
DEFAULT_CONFIG: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "zero_optimization": {
        "stage": 2,
        "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": False,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 25_000_000,
        "allgather_bucket_size": 200_000_000,
    },
}
# what DeepSpeed would build itself, and this project builds from its own flags
_OWNED = {
    "optimizer": "the optimizer is set by --base_lr and --optimizer.*",
    "scheduler": "the schedule is set by --base_lr and --optimizer.*",
    "fp16": "half precision is not supported; use bf16",
    "amp": "apex amp is not supported; use bf16",
    "wandb": "Weights & Biases is set by --wandb",
}


# the sections that must be objects where they are given, with an example
_SECTIONS: dict[tuple[str, ...], str] = {
    ("bf16",): '{"enabled": "auto"}',
    ("data_types",): '{"grad_accum_dtype": "fp32"}',
    ("zero_optimization",): '{"stage": 2}',
    ("zero_optimization", "offload_optimizer"): '{"device": "cpu"}',
}


@dataclass(frozen=True)
class LinkedField:
    """A setting that both a flag, ``--field``, and a key of the DeepSpeed config can name."""

    field: str
    key: str
    is_real: bool = False


_LINKED = (
    LinkedField("global_batch_size", "train_batch_size"),
    LinkedField("micro_batch_size", "train_micro_batch_size_per_gpu"),
    LinkedField("optimizer.clip_grad", "gradient_clipping", is_real=True),
)

# DeepSpeed ignores a name that it does not know: one that is nearly one of these is refused
_KNOWN = {*DEFAULT_CONFIG, *_OWNED}


def read_ds_config(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed config; None gives the values of ds_configs/zero2.json.

    ds_configs/NAME is the installed package's own where the current folder has none.
    """
    if path is None:
        return json.loads(json.dumps(DEFAULT_CONFIG))
    file = Path(path)
    if file.parts[:1] == ("ds_configs",) and not file.is_file():
        inside = Path(__file__).parents[2] / file
        file = inside if inside.is_file() else file
    require(file.is_file(), f"--ds_config {path or repr(path)} is not a file.")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ds_config {path} is not valid JSON: {error}.") from None
    require(isinstance(config, dict), f"--ds_config {path} holds {type(config).__name__}, not a JSON object.")
    for key in config.keys() - _KNOWN:
        meant = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.85)
        require(not meant, f'"{key}" in {path} would be ignored: did you mean "{"".join(meant)}"?')
    for keys in _SECTIONS:
        section = _lookup(config, keys)
        require(
            (section is None and keys[-1] not in (_lookup(config, keys[:-1]) or {})) or isinstance(section, dict),
            f'"{".".join(keys)}" in {path} is {json.dumps(section)}; it must be an object such as {_SECTIONS[keys]}.',
        )
    return config


def merge(run: Run, given: Collection[str], path: str | None, config: dict[str, Any]) -> Run:
    """The run config with the numbers that the DeepSpeed config fixes.

    A value in the file replaces the recipe's; "auto" or no value takes the flag's.

    Args:
        run: recipe and flags.
        given: the fields that a flag set.
        path: of the DeepSpeed config, for messages.
        config: the file's content.

    Raises:
        ConfigError: naming both places, where a flag and the file disagree; or for a section that this project sets.
    """
    place = path or "the default DeepSpeed config"
    for key, reason in _OWNED.items():
        section = config.get(key)
        enabled = section.get("enabled", key in ("optimizer", "scheduler")) if isinstance(section, dict) else section
        require(not enabled, f'"{key}" in {place} cannot be used: {reason}.')

    values: dict[str, Any] = {}
    for link in _LINKED:
        value = config.get(link.key)
        if value in (None, "auto"):
            continue
        kind = "number" if link.is_real else "whole number"
        require(
            not isinstance(value, bool) and isinstance(value, (int, float) if link.is_real else int),
            f'"{link.key}" in {place} is {value!r}, which is no {kind}.',
        )
        asked = _field(run, link.field)
        require(
            link.field not in given or asked == value,
            f'--{link.field} is {asked} but "{link.key}" in {place} is {value}: make them equal, '
            'or set the latter to "auto".',
        )
        values[link.field] = value

    bf16 = _lookup(config, ("bf16", "enabled"))
    if bf16 not in (None, "auto"):
        require(isinstance(bf16, bool), f'"bf16.enabled" in {place} is {bf16!r}; it must be true, false or "auto".')
        dtype = "bf16" if bf16 else "fp32"
        require(
            "dtype" not in given or run.dtype in ("auto", dtype),
            f'--dtype is {run.dtype} but "bf16.enabled" in {place} is {str(bf16).lower()}: make them agree, '
            'or set the latter to "auto".',
        )
        values["dtype"] = dtype
    return override(run, values)


def resolve(run: RunConfig, config: dict[str, Any], data_parallel_size: int) -> dict[str, Any]:
    """The config that is handed to DeepSpeed: every value decided, checked against the number of ranks.

    LARS trains without ZeRO whatever the config says: it takes norms of whole matrices.

    Raises:
        ConfigError: where accumulation steps disagree, or the ZeRO stage cannot do what the run asks.
    """
    accumulation = run.accumulation_steps(data_parallel_size)
    asked = config.get("gradient_accumulation_steps", "auto")
    require(
        asked in ("auto", accumulation),
        f'"gradient_accumulation_steps" in the DeepSpeed config is {asked}, but global_batch_size '
        f"{run.global_batch_size} / (micro_batch_size {run.micro_batch_size} x data-parallel size "
        f'{data_parallel_size}) = {accumulation}: set it to {accumulation} or "auto".',
    )
    zero = {} if run.optimizer.name == "lars" else dict(config.get("zero_optimization", {}))
    stage = zero.get("stage", 0)
    require(
        isinstance(stage, int) and not isinstance(stage, bool),
        f'"zero_optimization.stage" in the DeepSpeed config is {stage!r}; it must be the number 0, 1 or 2.',
    )
    require(
        stage in (0, 1, 2),
        f"ZeRO stage {stage} is not supported: use 1 or 2 (or 0 in fp32); split larger models with "
        "--tensor_parallel_size.",
    )
    require(
        stage > 0 or run.trained_dtype == "fp32",
        "ZeRO stage 0 serves as the fp32 reference only: DeepSpeed keeps no fp32 master weights there. "
        "Use --dtype fp32, or stage 1 or 2.",
    )
    require(
        not zero.get("round_robin_gradients"),
        '"zero_optimization.round_robin_gradients" in the DeepSpeed config is not supported: it reorders the weights '
        "that checkpoints and averages find by their places. Drop it.",
    )
    merged = {
        **config,
        "train_batch_size": run.global_batch_size,
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.clip_grad,
        "bf16": {**config.get("bf16", {}), "enabled": run.trained_dtype == "bf16"},
        "zero_optimization": {**zero, "stage": stage},
    }
    merged.setdefault("steps_per_print", None)
    if data_parallel_size == 1:
        if stage == 2 and "offload_optimizer" not in zero:
            # no sum over ranks: spare DeepSpeed a division by 1 and two copies of all gradients
            merged["zero_optimization"]["reduce_scatter"] = False
        if run.trained_dtype == "bf16":
            # nor one that rounding could hurt: spare it a copy to fp32 and back
            merged["communication_data_type"] = "bf16"
    unresolved = _find_auto(merged)
    require(
        not unresolved,
        f'"auto" has no flag to take its value from at: {", ".join(unresolved)}; write the value itself.',
    )
    return merged


def _lookup(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _field(run: RunConfig, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _find_auto(config: Any, path: str = "") -> list[str]:
    if isinstance(config, dict):
        return [found for key, value in config.items() for found in _find_auto(value, f"{path}.{key}".lstrip("."))]
    return [path] if config == "auto" else []
