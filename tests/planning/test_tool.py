"""tools/plan_run.py as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_nepa.cli import parse_command_line
from megatron_nepa.config import ConfigError
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.training.engine.deepspeed_config import merge, read_ds_config, resolve
from tools.plan_run import main

PROJECT = Path(__file__).parents[2]


def test_table_and_details(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--recipe", "nepa_7b", "--gpus", "512", "--top", "3"])
    text = capsys.readouterr().out
    assert "nepa_7b on 512 x H100 SXM 80 GB: 6,716.8 million parameters" in text
    assert "Predicted, not measured." in text
    for heading in ("Memory of a GPU", "Time of a step", "Collectives", "Kernels", "Data:", "Checkpoint:", "Run:"):
        assert heading in text
    assert "deepspeed pretrain_nepa.py --ds_config ds_configs/zero2.json --recipe nepa_7b" in text


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--recipe", "nepa_l", "--gpus", "16", "--json", "--top", "2"])
    first, second = json.loads(capsys.readouterr().out)
    assert first["images_per_second"] >= second["images_per_second"]
    assert first["memory_bytes"]["total"] == pytest.approx(
        sum(amount for part, amount in first["memory_bytes"].items() if part != "total")
    )
    assert {"layout", "step_seconds", "mfu", "collectives", "requirements", "command"} <= first.keys()


@pytest.mark.parametrize(
    ("recipe", "gpus", "flags"),
    [
        ("quickstart", 2, ["--global_batch_size", "32"]),
        ("nepa_b_release", 8, []),
        ("nepa_l", 16, ["--global_batch_size", "2048"]),
        ("nepa_7b", 64, []),
    ],
)
def test_the_commands_start_what_was_planned(
    recipe: str, gpus: int, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--recipe", recipe, "--gpus", str(gpus), "--json", "--top", "400", *flags])
    plans = json.loads(capsys.readouterr().out)
    batch = int(flags[1]) if flags else PRETRAINING_RECIPES[recipe]().global_batch_size
    assert len({json.dumps(plan["layout"]) for plan in plans}) == len(plans) > 10
    for plan in plans[:: max(1, len(plans) // 30)]:
        layout = plan["layout"]
        launcher, arguments = plan["command"].split("pretrain_nepa.py ")
        assert launcher.split() == ["deepspeed", *(["--num_gpus", str(gpus)] if gpus < 8 else [])]
        command = parse_command_line(arguments.split(), "", PRETRAINING_RECIPES)
        ds_config = read_ds_config(str(PROJECT / str(command.ds_config)))
        run = merge(command.run, command.given, command.ds_config, ds_config)
        resolved = resolve(run, ds_config, layout["data_parallel_size"])
        started = {
            "gpus": layout["data_parallel_size"] * run.parallel.tensor_parallel_size,
            "tensor_parallel_size": run.parallel.tensor_parallel_size,
            "sequence_parallel": run.parallel.sequence_parallel,
            "zero_stage": resolved["zero_optimization"]["stage"],
            "micro_batch_size": run.micro_batch_size,
            "activation_checkpointing": run.parallel.activation_checkpointing,
            "data_parallel_size": layout["data_parallel_size"],
        }
        assert started == layout
        assert resolved["gradient_accumulation_steps"] == plan["accumulation_steps"]
        # and nothing else of the recipe has changed
        planned = replace(
            PRETRAINING_RECIPES[recipe](),
            **{name: getattr(run, name) for name in ("parallel", "micro_batch_size", "data")},
            global_batch_size=batch,
            dtype="bf16",
            compile=False,
        )
        assert run == planned
        assert run.data == replace(PRETRAINING_RECIPES[recipe]().data, path="IMAGES")


def test_plot_is_a_picture(tmp_path: Path) -> None:
    main(["--recipe", "nepa_b", "--json", "--top", "1", "--plot", str(tmp_path / "scaling.png")])
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.png"]


def test_validation_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--validate"])
    text = capsys.readouterr().out
    assert "1,428" in text
    assert "21,561" in text
    assert "in 3 days" in text
    assert "1 x h200" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "24"], "must divide the batch; take 16 or 32 GPUs."),
        (["--gpu", "z9"], "--gpu z9 is unknown; there are h100, h200, a100."),
        (["--top", "0"], "--top is 0; it must be at least 1."),
        (["--json", "--dry_run"], "--dry_run prints a table, not JSON"),
        (["--plot", "."], "--plot . exists; remove it or name another file."),
        (["--global_batch_size", "0"], "global_batch_size is 0; it must be at least 1."),
        (["--plot", "no/such/folder.png"], "--plot no/such/folder.png cannot be written"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        main(arguments)


def test_a_mistake_is_one_line_and_a_status() -> None:
    tool = PROJECT / "tools" / "plan_run.py"
    command = [sys.executable, str(tool), "--recipe", "nepa_x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("plan_run: --recipe nepa_x is unknown; there are quickstart")
    assert result.stderr.count("\n") == 1
