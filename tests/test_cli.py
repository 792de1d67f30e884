"""Flags, recipes and DeepSpeed configs become one checked RunConfig."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from megatron_nepa.cli import Recipes, parse_command_line, sections_of
from megatron_nepa.config import ConfigError, ParallelConfig, RunConfig, override
from megatron_nepa.kernels.qk_norm_rope.fused import HEAD_DIMS
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, PROBING_RECIPES, SEGMENTATION_RECIPES
from megatron_nepa.training.engine.deepspeed_config import merge, read_ds_config, resolve


def parse(*arguments: str) -> RunConfig:
    return parse_command_line(arguments, "", PRETRAINING_RECIPES).run


@pytest.mark.parametrize("name", [*PRETRAINING_RECIPES, *CLASSIFICATION_RECIPES])
def test_every_recipe_is_valid_and_named_after_itself(name: str) -> None:
    run: RunConfig = {**PRETRAINING_RECIPES, **CLASSIFICATION_RECIPES}[name]()
    assert run.recipe == name
    assert run.accumulation_steps(1) * run.micro_batch_size == run.global_batch_size
    assert json.loads(json.dumps(run.to_dict())) == run.to_dict()


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_sizes_divide_every_pretraining_trunk_the_default_included(size: int) -> None:
    for recipe in PRETRAINING_RECIPES.values():
        assert override(recipe(), {"parallel.tensor_parallel_size": size}).model.head_size in HEAD_DIMS


@pytest.mark.parametrize(("name", "count"), [("nepa_b_release", 85_527_552), ("nepa_l_release", 302_967_808)])
def test_release_recipes_have_the_published_parameter_counts(name: str, count: int) -> None:
    run = PRETRAINING_RECIPES[name]()
    model = NepaForPretraining(run.model, run.objective)
    assert sum(param.numel() for param in model.parameters()) == count


@pytest.mark.parametrize(("value", "level"), [([], "full"), (["selective"], "selective"), (["none"], "none")])
def test_activation_checkpointing_without_a_value_is_full(value: list[str], level: str) -> None:
    run = parse("--activation_checkpointing", *value, "--steps", "3")
    assert run.parallel.activation_checkpointing == level


def test_flags_override_the_recipe() -> None:
    run = parse("--recipe", "nepa_l", "--tensor-parallel-size=2", "--sequence_parallel", "--model.drop_path", "0.2")
    assert run.model.num_layers == 24
    assert run.model.drop_path == 0.2
    assert run.parallel == ParallelConfig(2, True)


def test_a_short_flag_and_its_long_form_are_the_same() -> None:
    assert parse("--base_lr", "1e-3") == parse("--optimizer.base_lr", "1e-3")
    assert parse("--data", "/x") == parse("--data.path", "/x")


def test_steps_replace_epochs_and_the_reverse() -> None:
    run = parse("--recipe", "nepa_b", "--steps", "7")
    assert (run.steps, run.epochs) == (7, None)
    run = parse("--recipe", "quickstart", "--epochs", "2.5")
    assert (run.steps, run.epochs) == (None, 2.5)


def test_none_is_a_value() -> None:
    assert parse("--model.layer_scale_init", "none").model.layer_scale_init is None


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "recipes",
    [PRETRAINING_RECIPES, CLASSIFICATION_RECIPES, PROBING_RECIPES, SEGMENTATION_RECIPES],
    ids=["pretrain", "classify", "probe", "segment"],
)
def test_the_help_of_every_flag_ends_with_the_default_of_the_default_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipes: Recipes[RunConfig], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        parse_command_line(["--help"], "", recipes)
    text = capsys.readouterr().out
    assert all(len(line) <= width for line in text.splitlines() if line.startswith(" " * 24))  # help, not headings
    run = next(iter(recipes.values()))()
    assert f"\n  Defaults are those of --recipe {run.recipe}; other recipes differ.\n" in text
    listed = text.partition("\nrecipes:\n")[0]
    for flag in re.split(r"\n  (?=--)", listed)[1:]:  # a flag and its help; the next group's heading follows it
        described = " ".join(flag.partition("\n\n")[0].split())
        default = re.search(r" \(default: (\S+)\)$", described)
        assert default, described
        names = re.findall(r"--([\w.]+)", re.split(r"\s\s|\n", flag)[0])
        if names[-1] not in ("recipe", "ds_config"):
            value = attrgetter(names[-1])(run)
            assert default[1] == (str(value).lower() if value is None or isinstance(value, bool) else str(value))


@pytest.mark.parametrize("recipes", [PRETRAINING_RECIPES, CLASSIFICATION_RECIPES], ids=["pretrain", "classify"])
def test_help_explains_every_field(capsys: pytest.CaptureFixture[str], recipes: Recipes[RunConfig]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(["--help"], "", recipes)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    run = next(iter(recipes.values()))()
    sections = sections_of(run)
    names = [f"--{section}.{entry.name}" for section, cls in sections.items() for entry in fields(cls) if entry.init]
    names += [f"--{entry.name}" for entry in fields(run) if entry.name not in (*sections, "recipe")]
    lines = text.splitlines()
    for name in [*names, *recipes]:
        assert name in text
    for name in names:
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(name) or f", {name} " in line)
        explained = lines[at].split("  ")[-1].strip() if "  " in lines[at].strip() else lines[at + 1].strip()
        assert explained, name
        assert not explained.startswith("--"), f"{name} has no help"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nepa_x"], "there is no recipe 'nepa_x'"),
        (["--step", "3"], r"there is no flag --step \(did you mean --steps\?\)"),
        (["--model.hiden_size", "3"], "did you mean --model.hidden_size"),
        (["--steps", "many"], "'many' is not a number of type int"),
        (["--model.qk_norm", "rms"], "'rms' is not one of none, plain, affine"),
        (["--compile", "perhaps"], "'perhaps' is not true or false"),
        (["--base_lr", "inf"], "base_lr is inf; it must be a finite number"),
        (["--model.layer_scale_init", "nan"], "layer_scale_init is nan"),
        (["--model.rope_theta", "0"], "rope_theta is 0.0; it must be positive"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--data", ""], "data is empty"),
        (["--init_from", ""], "init_from is empty"),
        (["--epochs", "inf"], "epochs is inf; it must be a finite number"),
        (["--data.num_threads", "1000000"], "num_threads is 1000000; it must lie in 1 to 1024"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--sequence_parallel"], "set tensor_parallel_size to 2 or more"),
        (
            ["--recipe", "nepa_b", "--tensor_parallel_size", "5"],
            "5 does not divide model.num_heads 12: take .* 1, 2 or 4,",
        ),
        (["--model.image_size", "100"], "100 is not a multiple of model.patch_size 14: take .* 98 or 112"),
        (["--model.image_size", "10"], "10 is not a multiple of model.patch_size 14: take .* 28"),
        (["--model.num_heads", "5"], "hidden_size 256 is not divisible by model.num_heads 5: take .* 2, 4 or 8"),
        (["--model.num_heads", "128"], "256 / model.num_heads 128 = 2: take model.num_heads 16, 32 or 64"),
        (
            ["--model.hidden_size", "250"],
            "250 is not divisible by model.num_heads 4: take model.hidden_size 240 or 256",
        ),
        (["--steps", "3", "--epochs", "3"], "set either steps or epochs"),
        (["--objective.mask_ratio", "1.5"], r"must lie in \[0, 1\)"),
        (["--recipe", "aim_b", "--objective.mask_ratio", "0.4"], "mask_ratio is of the objective nepa or mae, which"),
        (["--recipe", "mae_b", "--model.causal", "true"], "set model.causal to false"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


def merged(
    config: Any, tmp_path: Path, *arguments: str, data_parallel_size: int = 1
) -> tuple[RunConfig, dict[str, Any]]:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    command = parse_command_line(["--ds_config", str(path), *arguments], "", PRETRAINING_RECIPES)
    content = read_ds_config(command.ds_config)
    run = merge(command.run, command.given, command.ds_config, content)
    return run, resolve(run, content, data_parallel_size)


def test_auto_takes_the_flags_values(tmp_path: Path) -> None:
    config = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
    given = ("--global_batch_size=32", "--micro_batch_size=4", "--dtype=bf16")
    _, resolved = merged(config, tmp_path, *given, data_parallel_size=2)
    assert resolved["train_batch_size"] == 32
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["bf16"]["enabled"] is True


def test_gradients_are_reduced_in_fp32_where_there_is_something_to_sum(tmp_path: Path) -> None:
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "communication_data_type": "fp32"}
    for data_parallel_size, dtype in ((1, "bf16"), (2, "fp32")):
        _, resolved = merged(config, tmp_path, data_parallel_size=data_parallel_size)
        assert resolved["communication_data_type"] == dtype


def test_one_rank_scatters_nothing(tmp_path: Path) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    for stage, more, data_parallel_size, kept in (
        (2, {}, 1, False),
        (2, {}, 2, True),
        (1, {}, 1, True),
        (2, offload, 1, True),
    ):
        config: dict[str, Any] = {"zero_optimization": {"stage": stage, "reduce_scatter": True, **more}}
        _, resolved = merged(config, tmp_path, data_parallel_size=data_parallel_size)
        assert resolved["zero_optimization"]["reduce_scatter"] is kept


def test_a_number_in_the_file_replaces_the_recipes(tmp_path: Path) -> None:
    config: dict[str, Any] = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
    config["bf16"] = {"enabled": False}
    run, _ = merged(config, tmp_path)
    assert (run.global_batch_size, run.micro_batch_size, run.optimizer.clip_grad, run.dtype) == (16, 2, 0.5, "fp32")


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("{not json", [], "is not valid JSON"),
        ("[1]", [], "holds list, not a JSON object"),
        ({"train_batch_size": 16}, ["--global_batch_size", "32"], "--global_batch_size is 32 but .* is 16"),
        ({"gradient_clipping": 2.0}, ["--optimizer.clip_grad", "1.0"], "clip_grad is 1.0 but .* is 2.0"),
        ({"bf16": {"enabled": True}}, ["--dtype", "fp32"], "--dtype is fp32 but .* is true"),
        ({"gradient_accumulation_steps": 3}, [], 'is 3, but global_batch_size 64 .* = 2: set it to 2 or "auto"'),
        ({"gradient_cliping": 2.0}, [], r'"gradient_cliping" in .* would be ignored: did you mean "gradient_clipping"'),
        ({"train_batch_size": "many"}, [], "is no whole number"),
        ({"train_batch_size": 8.0}, [], "is no whole number"),
        ({"bf16": True}, [], r'"bf16" in .* is true; it must be an object such as \{"enabled": "auto"\}'),
        ({"bf16": {"enabled": "yes"}}, [], "must be true, false or"),
        ({"zero_optimization": None}, [], "it must be an object"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}}, [], "it must be an object"),
        ({"zero_optimization": {"stage": "2"}}, [], "it must be the number 0, 1 or 2"),
        ({"zero_optimization": {"stage": 3}}, [], "ZeRO stage 3 is not supported"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, [], "round_robin_gradients.* Drop it"),
        ({"zero_optimization": {"stage": 0}}, ["--dtype", "bf16"], "ZeRO stage 0 serves as the fp32 reference only"),
        ({"fp16": {"enabled": True}}, [], "half precision is not supported"),
        ({"optimizer": {"type": "Adam"}}, [], "the optimizer is set by --base_lr"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, [], "zero_optimization.reduce_bucket_size"),
    ],
)
def test_a_contradiction_with_the_ds_config_is_named(
    config: Any, arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(config, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("batch", "replicas", "values", "choices"),
    [
        (50, 4, "global_batch_size 128, or global_batch_size 48 and micro_batch_size 12", [(128, 32), (48, 12)]),
        (100, 1, "global_batch_size 96 or 128, or micro_batch_size 25", [(96, 32), (128, 32), (100, 25)]),
        (64, 4, "global_batch_size 128, or micro_batch_size 16", [(128, 32), (64, 16)]),
        (1, 4, "global_batch_size 128, or global_batch_size 4 and micro_batch_size 1", [(128, 32), (4, 1)]),
    ],
)
def test_a_batch_that_the_replicas_cannot_share_names_sizes_that_they_can(
    batch: int, replicas: int, values: str, choices: list[tuple[int, int]]
) -> None:
    run = parse("--global_batch_size", str(batch), "--micro_batch_size", "32")
    refused = f"{batch} is not a multiple of micro_batch_size 32 x data-parallel size {replicas} = .*: take {values}"
    with pytest.raises(ConfigError, match=refused):
        run.accumulation_steps(replicas)
    for global_batch, micro_batch in choices:
        changed = override(run, {"global_batch_size": global_batch, "micro_batch_size": micro_batch})
        assert changed.accumulation_steps(replicas) >= 1


def test_the_default_ds_config_is_zero2() -> None:
    assert read_ds_config(None) == read_ds_config(str(Path(__file__).parents[1] / "ds_configs/zero2.json"))


def test_a_missing_ds_config_is_named() -> None:
    with pytest.raises(ConfigError, match=r"absent\.json is not a file"):
        read_ds_config("absent.json")
