"""The main job end to end: runs, resumes, stops, and refuses bad input."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.distributed.ranks import run_ranks
from tests.runs import TINY, kill_in_step, make_images, poison_from_step, pretrain, read_metrics, signal_in_step

ROOT = Path(__file__).parents[1]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def flags(images: Path, output_dir: Path, *more: str) -> list[str]:
    return [*TINY, f"--data={images}", f"--output_dir={output_dir}", *more]


def losses(output_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(output_dir)]


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The shards of a checkpoint by name, file and position."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def test_the_deepspeed_command_trains_on_a_grid(images: Path, tmp_path: Path) -> None:
    """As a user starts it: the default trunk on two ranks, tensor and sequence parallel, bf16, wandb offline."""
    output = tmp_path / "run"
    arguments = [f"--data={images}", f"--output_dir={output}", "--steps=3", "--global_batch_size=8", "--log_every=3"]
    arguments += ["--micro_batch_size=4", "--dtype=bf16", "--wandb=offline"]
    arguments += ["--tensor_parallel_size=2", "--sequence_parallel"]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [str(deepspeed), "--num_gpus", "2", "--master_port", "29577", str(ROOT / "pretrain_nepa.py")]
    command += ["--ds_config", str(ROOT / "ds_configs/zero2.json"), *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3 | loss" in done.stdout + done.stderr
    assert f"checkpoint  {output}/checkpoints/step_00000003" in done.stdout
    assert json.loads((output / "config.json").read_text())["decoder"]["num_threads"] in (1, 2, 4, 8, 16, 32, 64)

    rows = read_metrics(output)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for key in (
        "loss",
        "grad_norm",
        "lr",
        "samples_per_second",
        "tflops_per_device",
        "mfu",
        "data_wait_ms",
        "memory_gb",
    ):
        assert np.isfinite(rows[0][key]), key
    assert rows[-1]["target_effective_rank"] > 1
    config = json.loads((output / "config.json").read_text())
    assert config["run"]["parallel"]["tensor_parallel_size"] == 2
    assert config["ds_config"]["zero_optimization"]["stage"] == 2
    assert config["kernels"]["qk_norm_rope"]
    assert (output / "figures/loss.png").stat().st_size > 1000
    assert (output / "figures/health.png").stat().st_size > 1000
    session = next(output.glob("wandb/offline-run-*"))
    assert f"wandb sync {session}" in done.stdout


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_every_ds_config_trains(path: Path, images: Path, tmp_path: Path) -> None:
    if "offload" in path.stem:
        pytest.skip("compiles DeepSpeedCPUAdam: test_offload_trains, in make test-all")
    arguments = [flag for flag in flags(images, tmp_path / "run", "--steps=2") if not flag.startswith("--dtype")]
    assert run_ranks(2, pretrain, ["--ds_config", str(path), *arguments]) == [None, None]
    assert np.isfinite(losses(tmp_path / "run")[-1][1])


@pytest.mark.slow
def test_offload_trains(images: Path, tmp_path: Path) -> None:
    """ZeRO 2 with masters and moments on the host equals ZeRO 2 without, up to the rounding of another Adam."""
    for name in ("zero2_offload", "zero2"):
        config = ["--ds_config", str(ROOT / f"ds_configs/{name}.json")]
        assert run_ranks(1, pretrain, [*config, *flags(images, tmp_path / name, "--steps=3")]) == [None]
    for (_, loss, norm), (_, loss_, norm_) in zip(
        losses(tmp_path / "zero2_offload"), losses(tmp_path / "zero2"), strict=True
    ):
        assert abs(loss - loss_) < 1e-5
        assert abs(norm - norm_) < 1e-4 * norm_


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_continues_bit_for_bit(stage: int, images: Path, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    common = ["--ds_config", str(config), "--steps=6", "--save_every=2", "--log_every=2"]
    assert run_ranks(1, pretrain, flags(images, tmp_path / "whole", *common)) == [None]

    with pytest.raises(AssertionError, match="Killed"):
        run_ranks(1, pretrain, flags(images, tmp_path / "cut", *common), partial(kill_in_step, 6))
    assert run_ranks(1, pretrain, flags(images, tmp_path / "cut", *common)) == [None]

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (state_of(tmp_path / name / "checkpoints/step_00000006") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


def test_a_run_continues_on_another_grid(images: Path, tmp_path: Path) -> None:
    """Saved by TP 2 x DP 2 with sequence parallelism and ZeRO 2; continued by one rank with ZeRO 1, and the reverse."""
    zero1, zero2 = tmp_path / "zero1.json", tmp_path / "zero2.json"
    for path, stage in ((zero1, 1), (zero2, 2)):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, "use_multi_rank_bucket_allreduce": False}}))
    grid = ["--ds_config", str(zero2), "--tensor_parallel_size=2", "--sequence_parallel"]
    alone = ["--ds_config", str(zero1)]
    common = ["--steps=4", "--save_every=2"]
    for name, first, second in (("shrunk", (4, grid), (1, alone)), ("grown", (1, alone), (4, grid))):
        output = flags(images, tmp_path / name, *common)
        with pytest.raises(AssertionError, match="Killed"):
            run_ranks(first[0], pretrain, [*first[1], *output], partial(kill_in_step, 3))
        assert run_ranks(second[0], pretrain, [*second[1], *output]) == [None] * second[0]
    assert run_ranks(1, pretrain, [*alone, *flags(images, tmp_path / "whole", *common)]) == [None]
    expected = losses(tmp_path / "whole")
    for name in ("shrunk", "grown"):
        for (step, loss, norm), (step_, loss_, norm_) in zip(losses(tmp_path / name), expected, strict=True):
            assert step == step_
            assert abs(loss - loss_) <= 1e-6
            assert abs(norm - norm_) <= 1e-5 * norm_


def test_sigterm_saves_and_the_same_command_continues(images: Path, tmp_path: Path) -> None:
    arguments = flags(images, tmp_path / "run", "--steps=5")
    saved = f"saved {tmp_path / 'run/checkpoints/step_00000002'}"
    stopped = f"RunStopped: stopped by SIGTERM after step 2; {saved}; the same command continues from there"
    assert run_ranks(2, pretrain, arguments, partial(signal_in_step, 2)) == [stopped, stopped]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000002"
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2]
    assert run_ranks(2, pretrain, arguments) == [None, None]
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_the_first_step_is_written_at_once(images: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Killed"):
        run_ranks(1, pretrain, flags(images, tmp_path, "--steps=9", "--log_every=9"), partial(kill_in_step, 2))
    assert [step for step, _, _ in losses(tmp_path)] == [1]


def test_a_finished_run_says_so_and_changes_nothing(images: Path, tmp_path: Path) -> None:
    arguments = flags(images, tmp_path / "run", "--steps=2")
    assert run_ranks(1, pretrain, arguments) == [None]
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert run_ranks(1, pretrain, arguments) == [None]
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_run_continues_where_its_images_have_moved(images: Path, tmp_path: Path) -> None:
    arguments = ["--steps=2", "--save_every=1"]
    assert run_ranks(1, pretrain, flags(images, tmp_path / "run", *arguments)) == [None]
    moved = make_images(tmp_path / "moved")
    assert run_ranks(1, pretrain, flags(moved, tmp_path / "run", *arguments)) == [None]


def test_resume_path_given_again_goes_on_from_the_runs_own_checkpoint(images: Path, tmp_path: Path) -> None:
    assert run_ranks(1, pretrain, flags(images, tmp_path / "a", "--steps=2")) == [None]
    arguments = flags(images, tmp_path / "b", "--steps=5", "--save_every=1", f"--resume={tmp_path}/a")
    assert run_ranks(1, pretrain, arguments, partial(signal_in_step, 2))[0].startswith("RunStopped")
    assert run_ranks(1, pretrain, arguments) == [None]
    assert [step for step, _, _ in losses(tmp_path / "b")] == [3, 4, 5]


def test_two_runs_cannot_write_one_folder(images: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error = run_ranks(1, pretrain, flags(images, tmp_path / "run", "--steps=2"))[0]
    assert "(rank 0: another run is writing there: another process holds" in error
    assert error.endswith("choose another folder.")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_refused_before_training(images: Path, tmp_path: Path) -> None:
    (tmp_path / "run/config.json").mkdir(parents=True)
    errors = run_ranks(2, pretrain, flags(images, tmp_path / "run", "--steps=2"))
    assert all(f"--output_dir {tmp_path}/run cannot be written (rank 0: " in error for error in errors)


def test_old_checkpoints_are_removed(images: Path, tmp_path: Path) -> None:
    arguments = flags(images, tmp_path / "run", "--steps=4", "--save_every=1", "--keep_last=2")
    assert run_ranks(1, pretrain, arguments) == [None]
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000004"]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32")])
def test_non_finite_steps_are_skipped_counted_and_end_the_run(
    stage: int, dtype: str, images: Path, tmp_path: Path
) -> None:
    config = tmp_path / "ds.json"
    grad_accum = {"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}, **grad_accum}))
    arguments = flags(images, tmp_path / "run", "--steps=9", "--max_skipped_steps=2")
    arguments += ["--ds_config", str(config), f"--dtype={dtype}", "--save_every=1"]
    error = run_ranks(1, pretrain, arguments, partial(poison_from_step, 3))[0]
    assert error.startswith(
        "TrainingError: the gradient was not finite in 2 steps in a row (steps 3 to 4, samples 16 to 31)"
    )
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2]
    before, after = (state_of(tmp_path / f"run/checkpoints/step_0000000{step}") for step in (2, 3))
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_bad_input_is_refused_in_one_sentence_and_leaves_nothing(images: Path, tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "notes.jpg").write_text("no image")
    output = tmp_path / "run"
    good = flags(images, output, "--steps=2")
    decoded_nothing = [flag for flag in flags(Path("synthetic"), output) if "num_threads" not in flag]
    cases = [
        (flags(tmp_path / "absent", output, "--steps=2"), "absent"),
        (flags(empty, output, "--steps=2"), "empty"),
        (flags(text, output, "--steps=2"), "text"),
        ([*good, "--tensor_parallel_size=2"], "does not divide the number of ranks 1: start 2 ranks (deepspeed"),
        ([*good, "--resume", str(tmp_path / "nothing")], "holds no checkpoint"),
        ([*good, "--micro_batch_size=3"], "8 is not a multiple of micro_batch_size 3"),
        ([*decoded_nothing, "--epochs=1"], "give --steps"),
    ]
    for arguments, message in cases:
        error = run_ranks(1, pretrain, arguments)[0]
        assert error is not None, message
        assert error.startswith("ConfigError: "), error
        assert message in error, error
        assert "\n" not in error
        assert not output.exists()


def test_another_runs_folder_is_refused(images: Path, tmp_path: Path) -> None:
    arguments = flags(images, tmp_path / "run", "--steps=2")
    assert run_ranks(1, pretrain, arguments) == [None]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    error = run_ranks(1, pretrain, [*arguments, "--base_lr=0.5"])[0]
    assert "holds another run (optimizer.base_lr 0.0048 there, 0.5 here)" in error
    other = make_images(tmp_path / "others", count=19)
    error = run_ranks(1, pretrain, flags(other, tmp_path / "run", "--steps=2"))[0]
    assert "holds a run on other images" in error
    error = run_ranks(1, pretrain, [*arguments, "--resume=none"])[0]
    assert "--resume none starts afresh" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    arguments = flags(images, tmp_path / "run", "--steps=2")
    assert run_ranks(1, pretrain, arguments) == [None]
    shard = next((tmp_path / "run/checkpoints/step_00000002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    error = run_ranks(1, pretrain, [*flags(images, tmp_path / "b", "--steps=3"), f"--resume={tmp_path}/run"])[0]
    assert shard.name in error
    assert "no checkpoint is intact" in error


def test_the_script_exits_with_one_line_for_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pretrain_nepa.py"), "--recipe", "nepa_q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: there is no recipe 'nepa_q'")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
