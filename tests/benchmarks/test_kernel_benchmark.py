"""The kernel benchmark on a CPU: contenders run, a broken one is a row, the figures say where they come from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_nepa.benchmarks import kernels
from megatron_nepa.benchmarks.contenders import Contest, contests
from megatron_nepa.recipes.pretraining import quickstart

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_tool_prints_cpu_figures_and_says_so():
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "kernels", "--recipe", "quickstart"]
    command += ["--micro_batch_size", "1", "--operations", "swiglu,attention"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("CPU figures of the reference operations")
    rows = [line.split() for line in result.stdout.splitlines()[3:]]
    contenders = {"swiglu": ["eager", "compiled", "few_rows"], "attention": ["sdpa", "products", "compiled"]}
    assert [row[:2] for row in rows] == [[name, each] for name, those in contenders.items() for each in those]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 and row[4].endswith("%") for row in rows)


def test_an_unknown_operation_is_refused():
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "kernels", "--operations", "gelu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--operations gelu is unknown" in result.stderr


def test_the_definition_of_every_operation_runs_forward_and_backward():
    found = []
    for operation in contests(quickstart().model, 1, CPU, torch.float32):
        definition = next(iter(operation.contenders.values()))
        operation.contenders = {"definition": definition}
        (row,) = kernels.time_operation(operation, CPU, bandwidth=1e9)
        assert row.error == ""
        assert row.bandwidth_share == pytest.approx(operation.minimum_bytes / (row.total_ms / 1e3) / 1e9)
        found.append(operation.name)
    assert tuple(found) == kernels.NAMES


def test_a_contender_that_fails_is_a_row_with_its_error():
    def broken(x):
        raise Exception("needs another GPU\nand more")

    operation = Contest("square", {"x": torch.randn(4)}, ["x"], 16)
    operation.contenders = {"eager": lambda x: x.square(), "broken": broken}
    eager, failed = kernels.time_operation(operation, CPU, bandwidth=1e9)
    assert eager.error == ""
    assert (failed.error, failed.total_ms) == ("needs another GPU", None)
    assert "failed: needs another GPU" in kernels.format_table([eager, failed], CPU, 1e9)


def test_copy_bandwidth_is_positive_and_counts_both_directions(monkeypatch):
    monkeypatch.setattr(kernels, "COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr(kernels, "milliseconds", lambda call, device: 1.0)
    assert kernels.copy_bandwidth(CPU) == pytest.approx(2 * 4096 / 1e-3)


def test_the_tool_imports_what_it_is_asked_for_alone():
    """The benchmark of kernels runs where DALI and DeepSpeed are not installed, and help waits for nothing."""
    code = (
        "import runpy, sys\nsys.argv = ['benchmark.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('tools/benchmark.py', run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'nvidia.dali', 'deepspeed') if name in sys.modules])"
    )
    for arguments, heavy in ((["--help"], "[]"), (["kernels", "--help"], "['torch']")):
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == heavy
