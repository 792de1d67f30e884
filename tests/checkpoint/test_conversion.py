"""Conversion to and from the release's format: exact, from any grid, and nothing unsafe or unknown is let through."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_nepa import terminal
from megatron_nepa.checkpoint.conversion.compare import compare
from megatron_nepa.checkpoint.conversion.release_folder import read_release, write_release
from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.reading.weights import Weights, read_weights, write_weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore, Progress
from megatron_nepa.config import ConfigError
from tests.checkpoint.faults import record_messages
from tests.distributed.cases import MODEL, Case, Grid, build_engine, build_run, join_state
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain, read_metrics

RELEASABLE = replace(MODEL, position_embedding="none")


def save_on(case: Case, folder: Path) -> dict[str, Tensor]:
    """Write a checkpoint whose average is not its weights; returns its logical tensors, whole."""
    engine = build_engine(case)
    for tensor in engine.ema.tensors:
        tensor.mul_(0.9)
    CheckpointStore(folder, keep_last=1).save(
        engine.train_state, Progress(7, 56, 6), engine.zero_stage, build_run(case).to_dict()
    )
    return join_state(engine)


def start_on(case: Case, path: Path, choice: Any) -> tuple[dict[str, Tensor], str]:
    engine = build_engine(case)
    said = start_from(engine.train_state, str(path), choice, case.model)
    return join_state(engine), said


def plain(state: dict[str, Tensor], kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One kind of a logical state under the parameters' names, in the shapes of ``weights``."""
    return {name: state[f"{kind}.{name}"].reshape(value.shape) for name, value in weights.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of TP 2 x DP 2 with sequence parallelism, ZeRO 2."""
    folder = tmp_path_factory.mktemp("saved")
    case = Case(grid=Grid(data_size=2, tensor_size=2, sequence_parallel=True), model=RELEASABLE)
    return folder, run_ranks(4, save_on, case, folder)[0]


@pytest.fixture(scope="module")
def release(saved: tuple[Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "model"
    assert write_release(read_weights(saved[0]), folder) == [
        "left out, since the release has no such tensor: trunk.embedding.mask_token"
    ]
    return folder


@pytest.mark.parametrize("choice", ["ema", "raw"])
def test_weights_come_whole_from_any_grid(choice: Any, saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = saved
    weights = read_weights(folder, choice)
    assert weights.model == RELEASABLE
    assert_equal(weights.tensors, plain(state, {"ema": "ema", "raw": "master"}[choice], weights.tensors))
    assert len(weights.tensors) == len([name for name in state if name.startswith("master.")])


@pytest.mark.parametrize(
    "case",
    [
        Case(grid=Grid(zero_stage=1), model=RELEASABLE, dtype="bf16"),
        Case(grid=Grid(data_size=1, tensor_size=2, sequence_parallel=True), model=RELEASABLE),
    ],
    ids=["one rank, bf16, ZeRO 1", "TP 2"],
)
def test_a_run_starts_from_a_release_with_a_fresh_optimizer(case: Case, release: Path, tmp_path: Path) -> None:
    weights, notes = read_release(release)
    assert notes == []
    write_weights(weights, tmp_path / "start")
    state, said = run_ranks(case.grid.world_size, start_on, case, tmp_path / "start", "ema")[0]
    for kind in ("master", "ema"):
        assert_equal(plain(state, kind, weights.tensors), weights.tensors)
    assert not any(value.any() for name, value in state.items() if name.startswith("exp_avg"))
    assert "starting from the raw weights of the release" in said
    assert "at their initial values: trunk.embedding.mask_token" in said


def test_a_run_starts_from_either_weights_of_another_run(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = saved
    for choice, kind in (("ema", "ema"), ("raw", "master")):
        state, said = run_ranks(1, start_on, Case(model=RELEASABLE), folder, choice)[0]
        for name, value in state.items():
            if name.startswith(("master.", "ema.")):
                assert torch.equal(value, expected[f"{kind}.{name.partition('.')[2]}"]), name
        assert said.startswith(f"starting from the {'average' if choice == 'ema' else 'raw weights'} of {folder}")


def test_the_round_trip_is_bit_equal_and_the_same_model(
    saved: tuple[Path, dict[str, Tensor]], release: Path, tmp_path: Path
) -> None:
    write_weights(read_release(release)[0], tmp_path / "start")
    write_release(read_weights(tmp_path / "start"), tmp_path / "again")
    assert_equal(load_file(tmp_path / "again/model.safetensors"), load_file(release / "model.safetensors"))
    assert (tmp_path / "again/config.json").read_text() == (release / "config.json").read_text()
    found = compare(saved[0], tmp_path / "again")
    assert found.largest_difference == 0.0
    assert found.losses[0] == found.losses[1]
    assert found.differences(0.0) == ["trunk.embedding.mask_token is in A alone"]  # the release has none
    assert compare(saved[0], release, "raw").largest_difference > 1e-2, "the raw weights are another model"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trunk.embedding.bos_token": torch.full((64,), 10.0)}, "trunk.embedding.bos_token by"),
        ({"trunk.blocks.1.norm1.bias": torch.full((64,), torch.nan)}, "trunk.blocks.1.norm1.bias by nan"),
        ({"head.running_mean": torch.ones(2)}, "head.running_mean is in B alone"),
    ],
)
def test_every_tensor_is_compared(change: dict[str, Tensor], said: str, release: Path, tmp_path: Path) -> None:
    weights = read_release(release)[0]
    write_weights(replace(weights, tensors={**weights.tensors, **change}), tmp_path / "other")
    found = compare(release, tmp_path / "other").differences(1e-4)
    assert any(difference.startswith(said) for difference in found), found


def test_another_dtype_is_named_and_wrapped_names_are_taken(release: Path, tmp_path: Path) -> None:
    state = {f"module.{name}": value.half() for name, value in load_file(release / "model.safetensors").items()}
    found = compare(release, copy_release(release, tmp_path / "half", state)).differences(1.0)
    assert "trunk.norm.bias is stored as torch.float32 in A and torch.float16 in B" in found


def test_layer_scale_folds_into_the_same_function(release: Path, tmp_path: Path) -> None:
    weights, notes = read_release(release, fold=True)
    assert weights.model.layer_scale_init is None
    assert notes == ["LayerScale is folded: train with --model.layer_scale_init none"]
    write_release(weights, tmp_path / "folded")
    assert json.loads((tmp_path / "folded/config.json").read_text())["layerscale_value"] is None
    found = compare(release, tmp_path / "folded")
    assert 0 < found.largest_difference < 1e-5
    assert found.differences(1e-4) == []
    with pytest.raises(ConfigError, match="nothing to fold"):
        read_release(tmp_path / "folded", fold=True)


def copy_release(release: Path, target: Path, state: dict[str, Tensor], **config: Any) -> Path:
    target.mkdir()
    values = json.loads((release / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    save_file(state, target / "model.safetensors")
    return target


def test_qk_norm_is_what_config_json_says(release: Path, tmp_path: Path) -> None:
    state = load_file(release / "model.safetensors")
    norms = [name for name in state if name.endswith(("q_norm.weight", "k_norm.weight"))]
    without = {name: value for name, value in state.items() if name not in norms}
    weights, notes = read_release(copy_release(release, tmp_path / "untrained", without))
    assert notes[0].startswith("QK-norm weights that are not in the file start as ones: vit_nepa.encoder.layer.0.")
    assert torch.equal(weights.tensors["trunk.blocks.1.attention.q_norm"], torch.ones(RELEASABLE.head_size))
    assert read_release(copy_release(release, tmp_path / "plain", without, qk_norm_affine=False))[1] == []
    with pytest.raises(ConfigError, match=r"missing nothing, left over \[.*k_norm"):
        read_release(copy_release(release, tmp_path / "left_over", state, qk_norm_affine=False))


def test_keys_that_do_not_fit_are_listed(release: Path, tmp_path: Path) -> None:
    state = load_file(release / "model.safetensors")
    state["vit_nepa.extra"] = state.pop("vit_nepa.layernorm.bias")
    with pytest.raises(ConfigError, match=r"missing \['vit_nepa.layernorm.bias'\], left over \['vit_nepa.extra'\]"):
        read_release(copy_release(release, tmp_path / "a", state))
    with pytest.raises(ConfigError, match='"hidden_act": "gelu"; this model serves gelu without a gate'):
        read_release(copy_release(release, tmp_path / "b", state, hidden_act="gelu"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["norm.running_mean", "classifier.weight"], "holds no trunk, .*: convert the trunk's own checkpoint"),
        (["trunk.norm.weight", "decoder.head.weight", "decoder.neck.weight"], r"a head \(decoder\.\*\) .* consolidate"),
    ],
    ids=["probe", "segmenter"],
)
def test_the_checkpoints_of_other_tasks_are_refused_by_kind(names: list[str], message: str, tmp_path: Path) -> None:
    weights = Weights(RELEASABLE, dict.fromkeys(names, torch.ones(2)), "a run of another task")
    with pytest.raises(ConfigError, match=message) as error:
        write_release(weights, tmp_path / "release", fold=True)
    assert len(str(error.value)) < 200
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "config.json describes no released model"),
        ('{"hidden_size": "wide"}', "config.json describes no released model"),
        ('{"hidden_size": 64', "config.json is no JSON"),
        ('{"model_type": "bert"}', "config.json is of another model"),
    ],
)
def test_a_config_json_that_describes_nothing(text: str, message: str, release: Path, tmp_path: Path) -> None:
    copy_release(release, tmp_path / "a", load_file(release / "model.safetensors"))
    (tmp_path / "a/config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_release(tmp_path / "a")


def test_a_config_json_of_another_width(release: Path, tmp_path: Path) -> None:
    folder = copy_release(release, tmp_path / "a", load_file(release / "model.safetensors"), intermediate_size=20)
    with pytest.raises(ConfigError, match=r"feed_forward.up.weight is \(.*\) in the file, \(.*\) by config.json"):
        read_release(folder)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_the_average_is_read_without_running_code(release: Path, tmp_path: Path) -> None:
    raw = load_file(release / "model.safetensors")
    folder = copy_release(release, tmp_path / "both", raw)
    torch.save({name: 2 * value for name, value in raw.items()}, folder / "pytorch_model_ema.bin")
    bias = "trunk.norm.weight"
    assert torch.equal(read_release(folder)[0].tensors[bias], 2 * read_release(folder, "raw")[0].tensors[bias])
    torch.save({"weights": raw, "bomb": Bomb(tmp_path / "exploded")}, folder / "pytorch_model_ema.bin")
    with pytest.raises(ConfigError, match="is refused: it holds more than tensors"):
        read_release(folder)
    assert not (tmp_path / "exploded").exists()


def test_what_the_release_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(1, save_on, Case(), tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"position_embedding is learned, but the released model has no learned"):
        write_release(read_weights(tmp_path / "saved"), tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_the_script_starts_from_another_run(tmp_path: Path) -> None:
    common = [*TINY, f"--data={make_images(tmp_path / 'images')}", "--steps=1"]
    assert run_ranks(1, pretrain, [*common, f"--output_dir={tmp_path / 'a'}"]) == [None]
    start = [*common, f"--init_from={tmp_path / 'a'}", f"--output_dir={tmp_path / 'b'}"]
    said = tmp_path / "said"
    assert run_ranks(2, pretrain, [*start, "--tensor_parallel_size=2"], partial(record_messages, said)) == [None, None]
    assert f"starting from the average of {tmp_path}/a/checkpoints/step_00000001" in said.read_text()
    first, second = (read_metrics(tmp_path / name)[0] for name in "ab")
    assert second["step"] == 1
    assert second["lr"] == first["lr"]
    assert second["loss"] != first["loss"]

    write_weights(read_weights(tmp_path / "a"), tmp_path / "start")
    error = run_ranks(1, pretrain, [*common, f"--resume={tmp_path / 'start'}", f"--output_dir={tmp_path / 'c'}"])[0]
    assert "holds weights only: start a run from it with --init_from instead of --resume" in error
    error = run_ranks(1, pretrain, [*start, f"--resume={tmp_path / 'a'}"])[0]
    assert error.endswith("starts one: give one of them.")
    assert not (tmp_path / "c").exists()


def test_a_run_does_not_end_before_the_checkpoint_that_it_continues(tmp_path: Path) -> None:
    common = [*TINY, f"--data={make_images(tmp_path / 'images')}"]
    assert run_ranks(1, pretrain, [*common, "--steps=2", f"--output_dir={tmp_path / 'a'}"]) == [None]
    other = [*common, f"--resume={tmp_path / 'a'}", f"--output_dir={tmp_path / 'b'}"]
    for flag, said in (("--steps=1", "--steps 1"), ("--epochs=0.4", "--epochs 0.4 (1 steps)")):
        (error,) = run_ranks(1, pretrain, [*other, flag])
        assert f"{said} ends before step 2 of {tmp_path}/a/checkpoints/step_00000002" in error
    assert not (tmp_path / "b").exists()
    assert run_ranks(1, pretrain, [*other, "--steps=2"]) == [None]


def load_tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_tool(
    saved: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool, source = load_tool(), str(saved[0])

    def call(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *arguments])
        with pytest.raises(SystemExit) as ended, terminal.tool("convert_checkpoint"):
            tool.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out or printed.err

    status, out = call("inspect", source)
    assert status == 0
    assert "step 7, 56 samples, 1 steps skipped" in out
    assert "data parallel 2 x tensor parallel 2 with sequence parallelism, ZeRO 2, micro-batch 4, fp32" in out
    for name in ("raw", "ema"):
        assert call("to_release", source, f"{tmp_path}/{name}", "--weights", name)[0] == 0
    assert call("from_release", f"{tmp_path}/raw", f"{tmp_path}/start")[0] == 0
    assert "weights only, for --init_from: raw weights of the release" in call("inspect", f"{tmp_path}/start")[1]
    assert call("verify", f"{tmp_path}/start", f"{tmp_path}/raw")[0] == 0
    status, out = call("verify", f"{tmp_path}/raw", f"{tmp_path}/ema")
    assert status == 1
    assert "they differ" in out
    assert call("consolidate", source, f"{tmp_path}/one.safetensors")[0] == 0
    assert_equal(load_file(tmp_path / "one.safetensors"), read_weights(source).tensors)
    assert call("universal", source, f"{tmp_path}/universal")[0] == 0
    assert "step 7 of" in call("universal", f"{tmp_path}/universal", f"{tmp_path}/back")[1]
    assert call("verify", f"{tmp_path}/back", source, "--tolerance=0")[0] == 0
    for arguments in (["to_release", source, f"{tmp_path}/raw"], ["from_release", source, f"{tmp_path}/new"]):
        status, said = call(*arguments)
        assert status == 2
        assert said.startswith("convert_checkpoint: ")
    (tmp_path / "file").write_text("")
    status, said = call("to_release", source, f"{tmp_path}/file/below")
    assert status == 2
    assert said.startswith(f"convert_checkpoint: {tmp_path}/file/.below.partial: not a directory; ")
    assert "must not be negative" in call("verify", source, source, "--tolerance=nan")[1]
    assert call("inspect", "")[0] == 2
