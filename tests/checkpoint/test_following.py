"""A run has the shape of the trunk whose checkpoint it names, whichever recipe it is of and however it names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nepa.checkpoint.conversion.release_folder import write_release
from megatron_nepa.checkpoint.following import follow_checkpoint
from megatron_nepa.checkpoint.format.manifest import write_manifest
from megatron_nepa.checkpoint.reading.weights import Weights, consolidate, write_weights
from megatron_nepa.cli import parse_command_line
from megatron_nepa.config import ConfigError, ModelConfig, override
from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, PROBING_RECIPES, SEGMENTATION_RECIPES

TASKS = {
    "pretrain": PRETRAINING_RECIPES,
    "classify": CLASSIFICATION_RECIPES,
    "probe": PROBING_RECIPES,
    "segment": SEGMENTATION_RECIPES,
}
# no recipe has any of these values
SMALL = ModelConfig(
    image_size=64,
    patch_size=16,
    hidden_size=24,
    num_layers=2,
    num_heads=2,
    mlp="gelu",
    mlp_hidden_size=40,
    qk_norm="plain",
    rope_theta=50.0,
    position_embedding="none",
    bos_token=True,
    layer_scale_init=0.5,
    layer_norm_eps=1e-6,
)
SHAPE = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp", "mlp_hidden_size", "rope_theta", "bos_token")
VALIDATION = "--validation_data=v"


def weights_of(model: ModelConfig, classes: int = 0) -> Weights:
    tensors = {f"trunk.{name}": value for name, value in Trunk(model).state_dict().items()}
    if classes:
        tensors |= {
            "classifier.weight": torch.zeros(classes, model.hidden_size),
            "classifier.bias": torch.zeros(classes),
        }
        tensors |= {"fc_norm.weight": torch.ones(model.hidden_size), "fc_norm.bias": torch.zeros(model.hidden_size)}
    return Weights(model, tensors, "drawn")


def write_run(run: Any, folder: Path, step: int = 1) -> Path:
    """The manifest of a run's checkpoint: all that a description reads."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"files": {}, "run": run.to_dict(), "has_optimizer": True, "has_ema": True})
    return folder


def parse(task: str, *flags: str) -> Any:
    return parse_command_line(flags, "", TASKS[task], follow_checkpoint).run


WRITERS: dict[str, Callable[[Weights, Path], Any]] = {
    "checkpoint": write_weights,
    "file": consolidate,
    "release": write_release,
    "huggingface": lambda weights, folder: write_huggingface(weights, RunFacts(), folder),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_recipe_takes_the_trunk_of_what_it_names(task: str, form: str, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    WRITERS[form](weights_of(SMALL), source)
    for recipe in TASKS[task]:
        flags = [f"--recipe={recipe}", "--trunk" if task == "probe" else "--init_from", str(source)]
        if recipe.startswith("jepa"):  # whose samples have no BOS token, as SMALL's have
            with pytest.raises(ConfigError, match=r"set model\.bos_token to false"):
                parse(task, *flags)
            continue
        model = parse(task, *flags, f"--output_dir={tmp_path / 'new'}").model
        assert [getattr(model, name) for name in SHAPE] == [getattr(SMALL, name) for name in SHAPE]
        assert (model.position_embedding, model.layer_scale_init is None) == ("none", False)
        crop = {"quickstart_upernet": 112}.get(recipe, 512)  # of 518: the nearest that a patch of 16 divides
        assert model.image_size == (crop if task == "segment" else 64)
        gains = task != "probe" and TASKS[task][recipe]().model.qk_norm == "affine"
        assert model.qk_norm == ("affine" if gains else "plain")  # affine weights start as ones, which is plain
        if task != "probe":  # what is trained keeps its recipe's causality
            assert model.causal == TASKS[task][recipe]().model.causal


def test_sizes_of_a_recipe_follow_the_image_size(tmp_path: Path) -> None:
    write_weights(weights_of(SMALL), tmp_path / "trunk")
    start = f"--init_from={tmp_path / 'trunk'}"
    run = parse("classify", "--recipe=imagenet_ft_l_release", start, VALIDATION)
    assert run.evaluation.shorter_side(64) == round(235 * 64 / 224)
    run = parse("classify", start, VALIDATION)
    assert run.evaluation.shorter_side(64) == 73  # 64 / 0.875
    run = parse("segment", start, VALIDATION)
    assert (run.model.image_size, run.window_stride) == (512, 337)  # 341 of 518
    run = parse("segment", start, VALIDATION, "--model.image_size=256", "--evaluation.stride=100")
    assert (run.model.image_size, run.window_stride) == (256, 100)


def test_a_flag_may_resample_but_not_contradict(tmp_path: Path) -> None:
    write_weights(weights_of(SMALL), tmp_path / "trunk")
    start = ["--init_from", str(tmp_path / "trunk")]
    same = parse("classify", *start, "--model.hidden_size=24", "--model.image_size=96", "--model.patch_size=8").model
    assert (same.image_size, same.patch_size) == (96, 8)
    for flag in ("hidden_size=48", "num_layers=3", "mlp=swiglu", "qk_norm=none", "bos_token=false"):
        name, _, value = flag.partition("=")
        theirs = str(getattr(SMALL, name)).lower()
        with pytest.raises(ConfigError) as refused:
            parse("classify", *start, f"--model.{flag}")
        said = f"--model.{name} {value}, not {theirs} as in {tmp_path / 'trunk'}: a checkpoint knows the shape"
        assert said in str(refused.value)
        assert str(refused.value).endswith("drop it, or drop --init_from to draw a trunk of that shape.")
    with pytest.raises(ConfigError, match=r"layer_scale_init none, not 0.5 .* give another checkpoint as --trunk"):
        parse("probe", "--trunk", str(tmp_path / "trunk"), "--model.layer_scale_init=none")


def test_a_trunk_that_is_not_trained_is_followed_in_all_that_changes_its_outputs(tmp_path: Path) -> None:
    run = override(PRETRAINING_RECIPES["quickstart"](), {"model.causal": False, "model.residual_dtype": "bf16"})
    path = write_run(replace(run, dtype="fp32"), tmp_path / "run")
    probe = parse("probe", f"--trunk={path}", "--trunk.block=3")
    assert (probe.model.causal, probe.model.residual_dtype, probe.model.image_size) == (False, "bf16", 112)
    assert probe.dtype == "fp32"
    assert parse("probe", f"--trunk={path}", "--model.causal").model.causal
    with pytest.raises(ConfigError, match=r"trunk.block is 4; the trunk's 4 blocks"):
        parse("probe", f"--trunk={path}", "--trunk.block=4")


TRAINED = {
    "classify": {
        "model.image_size": 98,
        "model.causal": False,
        "head.pooling": "mean",
        "evaluation.resize_size": 100,
        "evaluation.squash": True,
        "dtype": "fp32",
    },
    "segment": {
        "model.image_size": 98,
        "model.causal": True,
        "masks.num_classes": 7,
        "masks.reduce_zero_label": False,
        "evaluation.stride": 33,
        "crops.shorter_side": 77,
        "dtype": "fp32",
    },
}


@pytest.mark.parametrize("task", TRAINED)
@pytest.mark.parametrize("named", ["output_dir", "init_from", "checkpoint"])
def test_an_evaluation_is_the_trained_runs_under_every_recipe(task: str, named: str, tmp_path: Path) -> None:
    trained = override(next(iter(TASKS[task].values()))(), TRAINED[task])
    path = write_run(trained, tmp_path / "run")
    flag = f"--output_dir={path}" if named == "output_dir" else f"--init_from={path}"
    if named == "checkpoint":
        flag += "/checkpoints/step_00000001"
    for recipe in TASKS[task]:
        run = parse(task, f"--recipe={recipe}", "--evaluate_only", VALIDATION, flag)
        found = run.fields_by_name()
        assert {name: found[name] for name in TRAINED[task]} == TRAINED[task]
        kept = ("drop_path", "rope_rescale", "rope_rescale_group", "freeze_patch_embedding", "layer_scale_init")
        training = {name: getattr(run.model, name) for name in kept}
        assert run.model == replace(trained.model, **training)
    assert parse(task, "--evaluate_only", VALIDATION, flag, "--dtype=bf16").dtype == "bf16"


@pytest.mark.parametrize("form", WRITERS)
def test_a_classifier_that_is_stored_alone_tells_its_pooling(form: str, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    WRITERS[form](weights_of(SMALL, classes=3), source)
    run = parse("classify", "--evaluate_only", VALIDATION, f"--init_from={source}")
    assert (run.head.pooling, run.model.image_size, run.evaluation.shorter_side(64)) == ("mean", 64, 73)


def test_a_run_goes_on_without_what_it_once_started_from(tmp_path: Path) -> None:
    trained = override(CLASSIFICATION_RECIPES["imagenet_ft_b"](), {"model.hidden_size": 96, "model.image_size": 112})
    write_run(trained, tmp_path / "run")
    damaged = write_run(trained, tmp_path / "run", step=2) / "checkpoints/step_00000002/state.json"
    damaged.write_text(damaged.read_text().replace("96", "48"))
    flags = [f"--init_from={tmp_path / 'gone'}", f"--output_dir={tmp_path / 'run'}"]
    assert parse("classify", *flags).model == trained.model
    with pytest.raises(ConfigError, match="gone holds no checkpoint"):
        parse("classify", *flags, "--resume=none")


@pytest.mark.parametrize("task", ["classify", "probe"])
def test_what_is_no_model_is_refused(task: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, said in (("folder", "holds no checkpoint"), ("text.safetensors", "cannot be read as safetensors")):
        with pytest.raises(ConfigError, match=said):
            parse(task, "--trunk" if task == "probe" else "--init_from", str(tmp_path / name))
