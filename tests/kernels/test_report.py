"""The kernel report: real sm_90 machine code and counted bytes, and that it fails on what it should fail on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from megatron_nepa.config import ConfigError
from megatron_nepa.kernels.launching.launch import launch
from megatron_nepa.kernels.proofs import byte_count, report
from megatron_nepa.kernels.proofs.machine_code import MachineCode
from tools.kernel_report import main

TOOL = Path(__file__).parents[2] / "tools" / "kernel_report.py"


def run_tool(*arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1]), "TRITON_INTERPRET": "0"} | environment
    return subprocess.run([sys.executable, TOOL, *arguments], env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_for_sm_90_without_spills_at_the_bound():
    result = run_tool("--arch", "sm_90", "--recipe", "nepa_b", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 10
    assert {row["operation"] for row in rows} == {
        "qk_norm_rope",
        "qk_norm_rope affine",
        "swiglu",
        "residual_norm",
        "cosine_loss",
    }
    for row in rows:
        assert row["faults"] == []
        assert row["code"]["registers"] > 16
        assert row["code"]["wide_loads"] >= 2
        assert row["code"]["wide_stores"] >= 1 or (row["operation"], row["direction"]) == ("cosine_loss", "forward")
        assert 0.98 < row["device_bytes"] / row["minimum_bytes"] < 1.03


GOOD = report.Row("nepa_b", "sm_90", "swiglu", "forward", MachineCode(32, 0, 0, 2, 1, 0, 0), 300, 300)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"local": 3}, "3 accesses to local memory"),
        ({"narrow": 4}, "4 accesses of 1 or 2 bytes"),
        ({"wide_loads": 0}, "0 loads of 16"),
    ],
)
def test_a_fault_fails_the_report(monkeypatch, capsys, change, fault):
    bad = replace(GOOD, code=replace(GOOD.code, **change))
    assert GOOD.faults == []
    monkeypatch.setattr(report, "build_report", lambda *_: [GOOD, bad])
    assert main(["--arch", "sm_90"]) == 1
    assert fault in capsys.readouterr().out
    monkeypatch.setattr(report, "build_report", lambda *_: [GOOD])
    assert main(["--arch", "sm_90"]) == 0


def test_a_kernel_that_does_not_compile_is_one_failed_row(monkeypatch, capsys):
    """Beside the rows of the others: nothing else of the table is lost."""

    def fail(launched, arch):
        if arch == "sm_80":
            raise RuntimeError("Internal Triton PTX codegen error\nptxas: no such instruction")
        return GOOD.code

    counts = [byte_count.LaunchCount("swiglu", "forward", [1.0], [1.0])]
    monkeypatch.setattr(report, "is_interpreting", lambda: False)
    monkeypatch.setattr(report, "count_bytes", lambda recipes: dict.fromkeys(recipes, counts))
    monkeypatch.setattr(report, "_launches", lambda *_: [("swiglu", "forward", 4, report.Launch(None, (), (), {}, 1))])
    monkeypatch.setattr(report, "device_bytes", lambda *_: 4)
    monkeypatch.setattr(report, "compile_launch", fail)
    assert main(["--recipe", "nepa_b"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("does not compile: ptxas: no such instruction")
    assert lines[2].endswith("none")


def test_excess_bytes_are_a_fault():
    assert replace(GOOD, device_bytes=315).faults == []
    assert "moves 316 bytes" in replace(GOOD, device_bytes=316).faults[0]


@triton.jit
def _wasteful_kernel(x, table, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    mask = tl.arange(0, N) < N // 2
    value = tl.load(x + at, mask=mask, other=0.0) + tl.load(x + at, mask=mask, other=0.0)
    tl.store(out + at, value + tl.load(table + tl.arange(0, N)))


def test_bytes_are_counted_under_the_mask_with_repetitions():
    x, table, out = torch.ones(64), torch.ones(16), torch.empty(64)

    def call():
        launch(_wasteful_kernel, (4,), x, table, out, N=16, num_warps=1)

    count = byte_count._count("wasteful", "forward", call)
    assert count.accessed == [1.0, 4.0, 1.0]  # half of x twice; the table once a program
    assert count.touched == [0.5, 1.0, 1.0]
    assert torch.equal(out.view(4, 16)[:, 0], torch.full((4,), 3.0))


def test_a_small_table_read_again_comes_from_the_cache():
    count = byte_count.LaunchCount("wasteful", "forward", [2.0, 32.0], [1.0, 1.0])
    big, small = torch.empty(2**21), torch.empty(100)
    launched = report.Launch(None, (1,), (big, small), {}, 1)
    assert byte_count.device_bytes(count, launched) == 2 * big.nbytes + small.nbytes


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="--recipe nepa_x is unknown"):
        main(["--recipe", "nepa_x"])
    with pytest.raises(ConfigError, match="--arch hopper"):
        main(["--arch", "hopper"])
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        main([])
