"""A flag that the run's mode ignores is refused, and names fields that exist."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_nepa.cli import parse_command_line
from megatron_nepa.config import ConfigError
from megatron_nepa.config.modes import MODES
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, PROBING_RECIPES, SEGMENTATION_RECIPES

PRETRAIN, CLASSIFY, PROBE, SEGMENT = (
    PRETRAINING_RECIPES,
    CLASSIFICATION_RECIPES,
    PROBING_RECIPES,
    SEGMENTATION_RECIPES,
)
VALID = "--validation_data=v"


@pytest.mark.parametrize(
    ("recipes", "mode", "ignored"),
    [
        (
            PROBE,
            ["--knn=20", VALID],
            ["--base_lr=1", "--epochs=3", "--seed=3", "--wandb=offline", "--init_weights=raw"],
        ),
        (CLASSIFY, ["--evaluate_only", VALID], ["--steps=3", "--data=d", "--resume=none", "--reset_head"]),
        (SEGMENT, ["--evaluate_only", VALID], ["--crops.ratio_min=0.7", "--layer_decay.rate=0.5"]),
        (CLASSIFY, [], ["--evaluation.every=3", "--evaluation.squash", "--reset_head", "--init_weights=raw"]),
        (PROBE, [], ["--model.drop_path=0.1", "--activation_checkpointing", "--optimizer.beta2=0.9"]),
        (PRETRAIN, ["--probe_every=0"], ["--probe.pooling=last", "--probe_validation_data=x", "--probe.block=2"]),
        (PRETRAIN, ["--data=synthetic"], ["--on_bad_image=fail", "--data.num_threads=3", "--data.crop_scale_min=0.5"]),
        (PRETRAIN, ["--on_bad_image=fail"], ["--data.max_bad_share=0.5"]),
        (PRETRAIN, ["--wandb=disabled"], ["--wandb_project=p"]),
        (PRETRAIN, ["--optimizer.ema_decay=0"], ["--optimizer.ema_warmup"]),
        (PRETRAIN, ["--optimizer.weight_decay=0"], ["--optimizer.decay_bos_token"]),
        (PRETRAIN, ["--model.bos_token=false"], ["--optimizer.decay_bos_token"]),
        (PRETRAIN, ["--model.rope=false"], ["--model.rope_theta=10", "--model.rope_rescale=2"]),
        (PRETRAIN, ["--model.rope_rescale=none"], ["--model.rope_rescale_group=4"]),
        (CLASSIFY, ["--layer_decay.rate_end=none"], ["--layer_decay.ramp=cosine"]),
        (CLASSIFY, ["--augmentation.rand_augment=none"], ["--augmentation.workers=2"]),
        (CLASSIFY, ["--augmentation.mixup=0"], ["--augmentation.cutmix_share=0.3"]),
        (CLASSIFY, ["--augmentation.mixup=0", "--augmentation.cutmix=0"], ["--augmentation.mix_group=8"]),
        (
            SEGMENT,
            [VALID, "--evaluation.inference=whole", "--model.position_embedding=none"],
            ["--evaluation.stride=9"],
        ),
        (PRETRAIN, [], ["--sequence_parallel"]),  # as the config itself says
    ],
)
def test_an_ignored_flag_is_refused(recipes: Any, mode: list[str], ignored: list[str]) -> None:
    parse_command_line(mode, "", recipes)
    for flag in ignored:
        with pytest.raises(ConfigError) as refused:
            parse_command_line([*mode, flag], "", recipes)
        name = flag.removeprefix("--").partition("=")[0]
        assert name in str(refused.value), refused.value
        assert "drop " in str(refused.value)


def test_a_switch_that_is_off_asks_for_nothing() -> None:
    parse_command_line(["--evaluate_only", VALID, "--compile=false", "--profile=none"], "", CLASSIFY)


def test_the_table_names_fields_that_exist() -> None:
    runs = [
        recipe().fields_by_name() for recipes in (PRETRAIN, CLASSIFY, PROBE, SEGMENT) for recipe in recipes.values()
    ]
    known = {name for run in runs for name in run}
    known |= {name.partition(".")[0] for name in known}
    assert {name for mode in MODES for name in mode.ignored} <= known


def test_both_neighbour_classifiers_have_the_same_defaults() -> None:
    probe = parse_command_line([], "", PRETRAIN).run.probe  # type: ignore[attr-defined]
    alone = parse_command_line(["--knn", VALID], "", PROBE).run
    assert (probe.neighbours, probe.pooling, probe.block) == (alone.knn, alone.trunk.pooling, alone.trunk.block)
