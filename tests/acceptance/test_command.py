"""The command as a user runs it on a CPU: green, killed and continued, and its figures on the results page."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_nepa.acceptance.command import fill_results, main
from megatron_nepa.acceptance.report import Entry, Report, Row, Status
from megatron_nepa.acceptance.runner import Runner
from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.config import ConfigError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "tools/acceptance.py")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "7"], "--only 7 is unknown; parts are 1, 2, 3, 4, 5, 6."),
        (["--patience", "0"], "--patience is 0.0; it must be above 0."),
        (["--output_dir", "/proc/none"], "cannot be written"),
    ],
)
def test_mistakes_are_sentences(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        main(arguments)


@pytest.mark.parametrize(("status", "code"), [("PASS", 0), ("NOT RUN", 0), ("FAIL", 1)])
def test_a_check_that_failed_stands_in_the_table_and_is_the_exit_status(
    status: Status, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Runner, number: str) -> None:
        row = Row("kernel swiglu, toy, bf16", status, "error 37 of what is allowed", "", "set --kernels reference.")
        self.report.add(Entry(number, "kernel swiglu, toy, bf16", 1.0, True, (row,)))

    monkeypatch.setattr(Runner, "run", run)
    assert main(["--only", "1", "--output_dir", str(tmp_path), "--page", str(tmp_path / "RESULTS.md")]) == code
    line = f"| 1 | kernel swiglu, toy, bf16 | **{status}** | error 37 of what is allowed |"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "acceptance.md").read_text()


def test_figures_go_to_the_results_page(tmp_path: Path) -> None:
    report = Report(tmp_path, Machine("a GPU", 4, "2.0", "0.1", "2026-01-01"), False, {"3": "speed"})
    row = Row("steps of B", "PASS", "fast", "", "", {"gpu_b_plain": "eager: fast"})
    report.add(Entry("3", "steps of B", 1.0, True, (row,)))
    fill_results(tmp_path / "RESULTS.md", report)
    (line,) = [line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if "eager: fast" in line]
    assert "a GPU, 4 threads; megatron_nepa 0.1, torch 2.0; 2026-01-01" in line
    assert "`python tools/acceptance.py --only 3`" in line
    assert json.loads((tmp_path / "RESULTS.json").read_text())["gpu_b_plain"]["figures"] == "eager: fast"


@pytest.mark.slow
def test_green_on_a_cpu_with_the_gpus_rows_not_run(tmp_path: Path) -> None:
    result = subprocess.run([*COMMAND, "--output_dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "acceptance.json").read_text())
    rows = {row["name"]: row for entry in report["entries"] for row in entry["rows"]}
    assert rows["kernel swiglu, toy, bf16"]["status"] == "PASS"
    assert rows["resume"]["status"] == "PASS"
    assert {rows[name]["figure"] for name in ("kernels of toy", "decoding speed", "memcheck of swiglu")} == {
        "needs a GPU"
    }
    assert {entry["part"] for entry in report["entries"]} == set("123456")


# packages beside torch, numpy and triton that a cluster's image may lack
ABSENT = (
    *("nvidia.dali", "nvidia.nvimgcodec", "deepspeed", "flash_attn", "transformers", "timm", "torchvision", "wandb"),
    *("safetensors", "matplotlib", "tqdm", "PIL", "skimage", "sklearn", "scipy"),
)
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if any(f"{name}.".startswith(f"{each}.") for each in ABSENT) else find(name, path, target)
PathFinder.find_spec = find_others
"""


@pytest.mark.slow
def test_with_torch_numpy_and_triton_alone_parts_1_and_3_say_what_to_carry_along(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"ABSENT = {ABSENT}\n{HIDE}")
    command = [*COMMAND, "--rehearsal", "--patience", "5", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((tmp_path / "acceptance.json").read_text())["entries"]
    rows = {row["name"]: row for entry in entries for row in entry["rows"]}
    passed = {name for name, row in rows.items() if row["status"] == "PASS"}
    assert {
        f"kernel {name}, toy, {dtype}" for name in ("swiglu", "cosine_loss") for dtype in ("fp32", "bf16")
    } <= passed
    assert {"steps of toy", "compiled steps of toy", "kernel swiglu of toy", "attention of toy"} <= passed
    for name, package in (
        ("resume", "pillow"),
        ("toy against transformers", "transformers"),
        ("data wait of toy", "nvidia-dali-cuda130"),
        ("pixels on the CPU", "nvidia-dali-cuda130"),
        ("FlashAttention-2", "flash-attn 2.8"),
    ):
        assert rows[name]["status"] == "NOT RUN", rows[name]
        assert package in rows[name]["remedy"], rows[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts", "longest"),
    [(["--only", "1,4,6"], "146", 9.0), (["--rehearsal", "--patience", "5"], "123456", 45.0)],
    ids=["quick parts", "all parts"],
)
def test_killed_at_ten_random_moments_and_continued_it_is_one_report(
    flags: list[str], parts: str, longest: float, tmp_path: Path
) -> None:
    draw, known = random.Random(0), {}
    command = [*COMMAND, *flags, "--output_dir", str(tmp_path)]
    for attempt in range(11):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if attempt < 10:
            time.sleep(draw.uniform(0.5, longest))
            process.kill()
        _, errors = process.communicate()
        assert attempt < 10 or process.returncode == 0, errors
        if not (tmp_path / "acceptance.json").is_file():
            continue  # killed before it began
        entries = json.loads((tmp_path / "acceptance.json").read_text())["entries"]
        found = {(entry["part"], entry["check"]): entry for entry in entries}
        assert len(found) == len(entries)
        # what was done stays as it was, its seconds too: it did not run again
        assert {key: found[key] for key in known} == known
        known = {key: entry for key, entry in found.items() if entry["final"]}
    names = [row["name"] for entry in entries for row in entry["rows"]]
    assert len(names) == len(set(names))
    assert {part for part, _ in known} == set(parts)
