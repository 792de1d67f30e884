"""The command line that starts a planned run."""

from __future__ import annotations

from megatron_nepa.config import PretrainingConfig, flag_of
from megatron_nepa.planning.cluster import GPUS_PER_NODE
from megatron_nepa.planning.layout import Layout
from megatron_nepa.recipes import PRETRAINING_RECIPES

IMAGES = "IMAGES"  # stands for the user's: without --data a run would train on the built-in photographs


def start_command(run: PretrainingConfig, layout: Layout) -> str:
    """The command that starts ``run`` spread as ``layout``: every field in which it departs from its recipe is a flag.

    It names the GPUs of one node; on several, the launcher says how many there are.
    """
    recipe = PRETRAINING_RECIPES[run.recipe]().fields_by_name()
    planned = layout.apply(run).fields_by_name()
    words = ["deepspeed"]
    if layout.gpus < GPUS_PER_NODE:
        words.append(f"--num_gpus {layout.gpus}")
    words += [f"pretrain_nepa.py --ds_config ds_configs/zero{layout.zero_stage}.json --recipe {run.recipe}"]
    words += [f"--data {IMAGES}"]
    words += [f"{flag_of(name)} {_text(value)}" for name, value in planned.items() if value != recipe[name]]
    return " ".join(words)


def _text(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
