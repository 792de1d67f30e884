"""``--init_from``: a trunk starts any task's model, from any grid or a release's folder, and never another trunk's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_nepa.checkpoint.conversion.compare import compare
from megatron_nepa.checkpoint.conversion.release_folder import write_release
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.reading.resume import load
from megatron_nepa.checkpoint.reading.weights import read_weights, write_weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.config import AimObjective, ConfigError
from megatron_nepa.models.resampling import resample_patch_kernel, resample_positions
from megatron_nepa.parallel.topology import Topology
from tests.checkpoint.test_conversion import RELEASABLE, save_on
from tests.distributed.cases import Case, Grid, Mutation, build_engine, build_run, join_state
from tests.distributed.ranks import run_ranks

ONE = Case(model=RELEASABLE)
SHARDED = Case(model=RELEASABLE, grid=Grid(data_size=2, tensor_size=2, sequence_parallel=True))


def add_classifier(num_classes: int, model: nn.Module, topology: Topology) -> None:
    """The release's classifier, with weights that no start leaves by accident."""
    model.fc_norm = nn.LayerNorm(64)
    model.classifier = nn.Linear(64, num_classes)
    nn.init.constant_(model.classifier.weight, num_classes / 100)


def save_classifier(folder: Path) -> None:
    torch.manual_seed(0)  # the head's biases, which are all of its logits
    engine = build_engine(ONE, partial(add_classifier, 10))
    CheckpointStore(folder, keep_last=1).save(
        engine.train_state, Progress(7, 56, 6), engine.zero_stage, build_run(ONE).to_dict()
    )


def start(case: Case, path: Path, choice: Any, num_classes: int | None = None, **options: bool) -> Any:
    """Start a classifier, or the pre-training model: its logical tensors and what was said, or the error."""
    mutation: Callable[..., None] | None = None if num_classes is None else partial(add_classifier, num_classes)
    engine = build_engine(case, mutation)
    try:
        said = start_from(engine.train_state, str(path), choice, case.model, **options)
    except ConfigError as error:
        return str(error)
    return join_state(engine), said


def start_each(calls: list[tuple[Any, ...]]) -> list[Any]:
    return [start(*arguments, **options) for *arguments, options in calls]


def test_classifiers_are_compared_by_their_logits(classifier: Path, tmp_path: Path) -> None:
    write_release(read_weights(classifier, "raw"), tmp_path / "release")
    found = compare(classifier, tmp_path / "release", "raw")
    assert (found.output, found.largest_difference) == ("logit", 0.0)
    assert found.largest_value > 0.01
    weights = read_weights(classifier, "raw")
    weights.tensors["classifier.bias"] += torch.eye(10)[3] / 2
    write_weights(weights, tmp_path / "other")
    assert compare(classifier, tmp_path / "other", "raw").largest_difference == pytest.approx(0.5)
    weights.tensors["classifier.bias"], weights.tensors["classifier.weight"] = torch.zeros(5), torch.zeros(5, 64)
    write_weights(weights, tmp_path / "five")
    with pytest.raises(ConfigError, match=r"tells 10 classes apart and .* 5: there is nothing to compare"):
        compare(classifier, tmp_path / "five", "raw")


def test_a_damaged_start_names_its_flag(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "damaged")
    largest = max((tmp_path / "damaged").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"\x7f")
    error = run_ranks(1, start, ONE, tmp_path / "damaged", "raw", 10)[0]
    assert "does not have the checksum" in error
    assert error.endswith("restore it, or give another as --init_from.")


def head_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith("master.") and ".trunk." not in key}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A pre-training run of TP 2 x DP 2 with sequence parallelism, whose average is not its weights."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(4, save_on, SHARDED, folder)[0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    run_ranks(1, save_classifier, folder)
    return folder


@pytest.fixture(scope="module")
def release(saved: tuple[Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released model with both kinds of weights."""
    folder = tmp_path_factory.mktemp("release")
    for choice in ("raw", "ema"):
        write_release(read_weights(saved[0], choice), folder / choice)
    torch.save(load_file(folder / "ema/model.safetensors"), folder / "raw/pytorch_model_ema.bin")
    return folder / "raw"


def assert_trunk(state: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    """Masters and average are the ``kind`` of weights that ``expected`` holds; the moments are fresh."""
    keys = [key for key in state if ".trunk." in key and not key.endswith("mask_token")]
    for key in keys:
        name = key.partition(".")[2]
        if key.startswith("exp_avg"):
            assert not state[key].any(), key
        else:
            assert torch.equal(state[key], expected[f"{kind}.{name}"]), key
    assert len(keys) == 4 * sum(key.startswith("master.trunk.") for key in keys)


@pytest.mark.parametrize("case", [ONE, SHARDED.on(tensor_size=2)], ids=["one rank", "TP 2"])
def test_a_classifier_starts_from_any_trunk(
    case: Case, saved: tuple[Path, dict[str, Tensor]], release: Path, classifier: Path
) -> None:
    run, expected = saved
    calls = [(case, run, "ema", 5, {}), (case, run, "raw", 5, {}), (case, release, "ema", 5, {})]
    calls += [(case, release, "raw", 5, {}), (case, release.with_name("ema"), "ema", 5, {})]
    found = run_ranks(case.grid.world_size, start_each, calls)[0]
    for (state, said), kind in zip(found, ("ema", "master", "ema", "master", "ema"), strict=True):
        assert_trunk(state, expected, kind)
        head = head_of(state)
        assert torch.equal(head["master.classifier.weight"], torch.full((5, 64), 0.05))
        assert "at their initial values: " in said
        assert "fc_norm.* (2 tensors), classifier.* (2 tensors)" in said
    assert found[2][1].startswith(f"starting from the average of the release {release}\n")
    assert found[4][1].startswith(f"starting from the raw weights of the release {release.with_name('ema')}\n")


def test_a_head_that_does_not_fit_is_an_error_unless_it_is_reset(classifier: Path) -> None:
    calls = [(ONE, classifier, "raw", 10, {}), (ONE, classifier, "raw", 5, {})]
    calls += [(ONE, classifier, "raw", count, {"reset_head": True}) for count in (5, 10)]
    fits, error, reset, same_size = run_ranks(1, start_each, calls)[0]
    assert torch.equal(head_of(fits[0])["master.classifier.weight"], torch.full((10, 64), 0.1))
    assert "initial" not in fits[1]
    assert error.startswith(
        f"--init_from {classifier} holds another head: classifier.weight is (10, 64) there, (5, 64)"
    )
    assert "give --reset_head" in error
    for _, said in (reset, same_size):
        assert "at their initial values: fc_norm.* (2 tensors), classifier.* (2 tensors)" in said
    assert torch.equal(head_of(reset[0])["master.classifier.weight"], torch.full((5, 64), 0.05))


def test_a_head_that_the_model_has_not_is_left_out(classifier: Path) -> None:
    state, said = run_ranks(1, start, ONE, classifier, "raw")[0]
    assert head_of(state) == {}
    assert "left out, of a head that this model does not have: classifier.* (2 tensors), fc_norm.* (2 tensors)" in said


def refusal(checkpoint: Path, case: Case, *change: Mutation) -> str:
    """What is said when a run of ``case`` is to go on from it, with a model that ``change`` was made to."""
    engine = build_engine(ONE, *change)
    with pytest.raises(ConfigError) as error:
        load(engine.train_state, checkpoint, read_manifest(checkpoint), build_run(case).to_dict())
    return str(error.value)


def test_a_run_of_another_task_is_not_continued(saved: tuple[Path, dict[str, Tensor]]) -> None:
    error = run_ranks(1, refusal, saved[0] / "step_00000007", ONE, partial(add_classifier, 5))[0]
    assert "is of another task, it holds no classifier.bias: start from its weights with --init_from" in error


def test_a_run_of_another_objective_is_not_continued(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Whose tensors would do: those of NEPA are the trunk's alone."""
    error = run_ranks(1, refusal, saved[0] / "step_00000007", replace(ONE, objective=AimObjective()))[0]
    assert "is of the objective nepa, this run of aim: start from its trunk with --init_from" in error


def test_another_patch_and_image_size_are_resampled_to(tmp_path: Path) -> None:
    there, here = replace(RELEASABLE, position_embedding="learned"), {"image_size": 112, "patch_size": 16}
    expected = run_ranks(1, save_on, Case(model=there), tmp_path)[0]
    case = Case(model=replace(there, **here), grid=Grid(tensor_size=2))
    state, said = run_ranks(2, start, case, tmp_path, "raw")[0]
    weight, positions = (f"master.trunk.embedding.{name}" for name in ("weight", "positions"))
    assert torch.equal(state[weight], resample_patch_kernel(expected[weight], 16))
    assert torch.equal(state[positions], resample_positions(expected[positions], 4, 7))
    unequal = {key for key in state if key.startswith("master.") and not torch.equal(state[key], expected[key])}
    assert unequal == {weight, positions}
    assert "resampled to this patch and image size: trunk.embedding.weight, trunk.embedding.positions" in said


def test_a_checkpoint_without_a_trunk_is_refused(classifier: Path, tmp_path: Path) -> None:
    """A linear probe's, say."""
    weights = read_weights(classifier, "raw")
    head = {name: value for name, value in weights.tensors.items() if name.startswith("classifier.")}
    write_weights(replace(weights, tensors=head), tmp_path / "head")
    with pytest.raises(ConfigError, match="head holds no trunk"):
        compare(classifier, tmp_path / "head", "raw")
    (found,) = run_ranks(1, start_each, [(Case(model=RELEASABLE), tmp_path / "head", "raw", 10, {})])
    assert f"--init_from {tmp_path / 'head'} holds no trunk" in found[0]


def test_another_trunk_is_one_sentence_that_names_both_sides(
    saved: tuple[Path, dict[str, Tensor]], release: Path
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "hidden_size 64 there, 32 here": {"hidden_size": 32},
        "num_layers 2 there, 3 here": {"num_layers": 3},
        "num_heads 4 there, 2 here": {"num_heads": 2, "qk_norm": "none"},
        "mlp swiglu there, gelu here": {"mlp": "gelu"},
        "qk_norm affine there, plain here": {"qk_norm": "plain"},
        "position_embedding none there, learned here": {"position_embedding": "learned"},
        "bos_token True there, False here": {"bos_token": False},
        "layer_scale present there, absent here": {"layer_scale_init": None},
    }
    calls = [
        (Case(model=replace(RELEASABLE, **change)), path, "raw", None, {})
        for path in (saved[0], release)
        for change in changes.values()
    ]
    errors = run_ranks(1, start_each, calls)[0]
    for error, fact in zip(errors, [*changes, *changes], strict=True):
        assert "holds another trunk: " in error
        assert fact in error
        assert re.search(r"; give (--model\.\w+ [\w.-]+ ?)+, or another checkpoint\.$", error), error
        assert error.count("\n") == 0
        assert len(error) < 330
