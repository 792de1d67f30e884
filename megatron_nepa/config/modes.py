"""Settings that a chosen mode leaves without effect: a flag for one of them is refused, rather than ignored.

The command line checks this, which alone knows what was asked for: recipes set fields whatever the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megatron_nepa.config.checks import require
from megatron_nepa.config.flags import flag_of
from megatron_nepa.config.run import RunConfig

# what serves training alone; a name without a dot may be a whole section
TRAINING = (
    *("steps", "epochs", "global_batch_size", "micro_batch_size", "resume", "seed", "reset_head"),
    *("save_every", "keep_last", "keep_every", "async_save", "log_every", "max_skipped_steps", "stall_timeout"),
    *("wandb", "wandb_project", "profile", "compile", "optimizer", "layer_decay", "augmentation"),
    *("model.rope_rescale", "model.rope_rescale_group", "model.drop_path", "model.init_std"),
    *("model.freeze_patch_embedding", "parallel.activation_checkpointing", "evaluation.every"),
    *("data.crop_scale_min", "data.horizontal_flip", "data.on_bad_image", "data.max_bad_share"),
    *("crops.ratio_min", "crops.ratio_max", "crops.cat_max_ratio"),
)
_DECODING = ("data.num_threads", "data.hw_decoder_load")


class Values(dict[str, Any]):
    """The fields of a run by name, None for one that its task does not have."""

    def __missing__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Mode:
    """Fields, one choice among them, and what it leaves without effect.

    Attributes:
        chosen: whether a run, as "section.field" to value, has made the choice; a field that it lacks is None.
        reason: what the choice is and does, for a message.
        ignored: fields, or whole sections, without effect then.
    """

    chosen: Callable[[Values], bool]
    reason: str
    ignored: tuple[str, ...]


MODES = (
    Mode(lambda run: bool(run["evaluation.only"]), "--evaluate_only trains nothing", (*TRAINING, "data.path")),
    Mode(lambda run: run["knn"] is not None, "--knn trains nothing", (*TRAINING, "init_weights")),
    Mode(
        lambda run: "trunk.path" in run,
        "the trunk of a probe is not trained",
        (
            *("model.rope_rescale", "model.rope_rescale_group", "model.drop_path", "model.init_std"),
            *("model.freeze_patch_embedding", "parallel.activation_checkpointing", "optimizer.decay_bos_token"),
        ),
    ),
    Mode(
        lambda run: "evaluation.data" in run and run["evaluation.data"] is None,
        "without --validation_data nothing is evaluated",
        ("evaluation",),
    ),
    Mode(lambda run: run["probe.every"] == 0, "without --probe_every nothing is probed", ("probe",)),
    Mode(
        lambda run: run["data.path"] == "synthetic",
        "synthetic images are drawn, not decoded or cropped",
        ("data.crop_scale_min", "data.horizontal_flip", "data.on_bad_image", "data.max_bad_share"),
    ),
    Mode(
        lambda run: run["data.path"] == "synthetic" and run["probe.every"] == 0,
        "synthetic images are drawn, not decoded",
        _DECODING,
    ),
    Mode(
        lambda run: run["data.on_bad_image"] == "fail",
        "--on_bad_image fail ends the run at the first bad image",
        ("data.max_bad_share",),
    ),
    Mode(
        lambda run: run["init_from"] is None and not run["evaluation.only"],
        "without --init_from the run starts from weights that it draws",
        ("init_weights", "reset_head"),
    ),
    Mode(lambda run: run["wandb"] == "disabled", "--wandb is disabled", ("wandb_project",)),
    Mode(lambda run: run["optimizer.name"] == "lars", "LARS has one moment", ("optimizer.beta2", "optimizer.eps")),
    Mode(lambda run: run["optimizer.ema_decay"] == 0, "there is no average", ("optimizer.ema_warmup",)),
    Mode(lambda run: run["optimizer.weight_decay"] == 0, "nothing is decayed", ("optimizer.decay_bos_token",)),
    Mode(lambda run: not run["model.bos_token"], "there is no BOS token", ("optimizer.decay_bos_token",)),
    Mode(
        lambda run: run["parallel.tensor_parallel_size"] == 1,
        "without --tensor_parallel_size no rows are exchanged",
        ("parallel.chunk_bytes",),
    ),
    Mode(
        lambda run: not run["model.rope"],
        "there is no RoPE",
        ("model.rope_theta", "model.rope_rescale", "model.rope_rescale_group"),
    ),
    Mode(lambda run: run["model.rope_rescale"] is None, "RoPE is not rescaled", ("model.rope_rescale_group",)),
    Mode(
        lambda run: run["layer_decay.rate_end"] is None,
        "without --layer_decay.rate_end the rate stays as it is",
        ("layer_decay.ramp",),
    ),
    Mode(
        lambda run: run["augmentation.rand_augment"] is None,
        "without --augmentation.rand_augment no process augments",
        ("augmentation.workers",),
    ),
    Mode(
        lambda run: run["augmentation.mixup"] == 0 or run["augmentation.cutmix"] == 0,
        "Mixup and CutMix are not both on",
        ("augmentation.cutmix_share",),
    ),
    Mode(
        lambda run: run["augmentation.mixup"] == 0 and run["augmentation.cutmix"] == 0,
        "nothing is mixed",
        ("augmentation.mix_group",),
    ),
    Mode(
        lambda run: run["evaluation.inference"] == "whole",
        "--evaluation.inference whole has no windows",
        ("evaluation.stride",),
    ),
)


def refuse_ignored(run: RunConfig, given: Collection[str]) -> None:
    """Refuse a flag that the run's mode ignores.

    A switch that is given as off (false, none or 0) asks for nothing and passes.

    Args:
        run: recipe and flags.
        given: the fields that a flag set.

    Raises:
        ConfigError: naming the flag and the reason.
    """
    values = Values(run.fields_by_name())
    asking = [name for name in values if name in given and values[name] not in (None, False, 0)]
    for mode in MODES:
        if not mode.chosen(values):
            continue
        ignored = [name for name in asking if name in mode.ignored or name.partition(".")[0] in mode.ignored]
        flags = ", ".join(map(flag_of, ignored))
        them = "it" if len(ignored) == 1 else "them"
        require(not ignored, f"{flags} would be ignored: {mode.reason}; drop {them}.")
