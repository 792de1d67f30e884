"""The doctor: what it finds here is true, and what is broken fails with a remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_nepa.benchmarks.contenders import Contest
from megatron_nepa.config import ConfigError
from megatron_nepa.doctor import checks, decoding, installation, operations, parallel
from megatron_nepa.doctor.report import Row, guarded, lines
from megatron_nepa.kernels.attention.backends import attention_sdpa
from tests.distributed.ranks import run_ranks
from tests.kernels import flash_attn_stub

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def by_name(rows: Iterator[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_an_error_in_a_check_is_a_row() -> None:
    def broken() -> Iterator[Row]:
        yield Row("first", "ok", "fine")
        raise OSError("no such thing")

    first, failed = guarded("group", broken)
    assert first.status == "ok"
    assert (failed.name, failed.status, failed.found) == ("group", "failed", "OSError: no such thing")
    text = list(lines(failed))
    assert text[0].startswith("failed")
    assert text[1].strip().startswith("-> ")


def test_this_installation_is_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    rows = by_name(installation.check_installation())
    assert not [row for row in rows.values() if row.status == "failed"]
    assert rows["torch"].found == importlib.metadata.version("torch")
    assert rows["Slurm"].status == "absent"


def test_what_is_missing_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("deepspeed", *installation.DALI):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    occupied = tmp_path / "file"
    occupied.touch()
    monkeypatch.setenv("MEGATRON_NEPA_CACHE", str(occupied / "cache"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    rows = by_name(installation.check_installation())
    failed = {name for name, row in rows.items() if row.status == "failed"}
    assert failed == {"deepspeed", "DALI", "cache of built-in images", "Slurm"}
    assert all(rows[name].remedy for name in failed)
    assert rows["C++ compiler"].status == "absent"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (compiler,) = installation._compilers()
    assert compiler.status == "failed"
    assert compiler.remedy


def test_two_dali_wheels_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "installed", lambda package: "2.4")
    (row,) = installation._dali()
    assert row.status == "failed"
    assert "pip uninstall" in row.remedy


def test_kernels_and_attention_pass_here() -> None:
    rows = by_name(operations.check_operations(CPU))
    kernels = {f"kernel {name}" for name in ("qk_norm_rope", "swiglu", "residual_norm", "cosine_loss")}
    assert rows.keys() == kernels | {"attention", "FlashAttention-2"}
    assert {row.status for name, row in rows.items() if name != "FlashAttention-2"} == {"ok"}


def square(x: Tensor) -> Tensor:
    return x.square()


def test_a_wrong_operation_fails() -> None:
    operation = Contest("square", {"x": torch.randn(64)}, ["x"], 0, {"definition": square})
    assert operations.excess(operation, square) <= 1
    # a wrong output, a wrong gradient, and none at all
    assert operations.excess(operation, lambda x: x.square() * 1.001) > 1
    assert operations.excess(operation, lambda x: (x.square() * 2).sub(x.detach().square())) > 1

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nand more")

    row = operations.judge("kernel square", operation, broken, "it", "mend it.")
    assert (row.status, row.remedy) == ("failed", "mend it.")
    assert "no kernel image" in row.found


def test_flash_attention_is_judged_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn_stub.install(monkeypatch)
    qkv = torch.randn(1, 8, 3, 2, 32, dtype=torch.bfloat16)
    operation = Contest("attention", {"qkv": qkv, "causal": True}, ["qkv"], 0, {"sdpa": attention_sdpa})
    rows = by_name(operations.check_attention(operation, torch.device("cuda")))
    assert rows["attention flash_attn"].status == "ok"
    operation.inputs["causal"] = False
    monkeypatch.setattr(operations, "attention_candidates", lambda *_, **__: [lambda qkv, causal: qkv[:, :, 0] * 1])
    (row,) = (row for row in operations.check_attention(operation, torch.device("cuda")) if row.status == "failed")
    assert "uninstall or rebuild flash-attn" in row.remedy


def test_the_decoder_agrees_with_pillow_and_a_wrong_one_fails() -> None:
    rows = by_name(decoding.check_decoding(CPU))
    assert rows["DALI decoding on the CPU"].status == "ok"
    assert rows["DALI decoding on a GPU"].status == "not checked"
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    shifted = images.roll(1, -1)
    assert decoding.compare("x", shifted, images, "another", "mend it.").status == "failed"


def test_a_parallel_step_agrees_and_a_wrong_one_fails() -> None:
    alone = run_ranks(1, parallel.train_steps, CPU, 1)[0]
    together = run_ranks(4, parallel.train_steps, CPU, 2)[0]
    assert parallel.compare("step", alone, together, "here").status == "ok"
    wrong = [(loss, norm * 1.001) for loss, norm in together]
    row = parallel.compare("step", alone, wrong, "here")
    assert row.status == "failed"
    assert row.remedy


def test_bandwidths_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_ranks(2, parallel.bandwidths, CPU)[0]
    assert found.keys() == {"all-reduce", "all-gather", "reduce-scatter", "broadcast"}
    assert all(value > 0 for value in found.values())


def test_one_gpu_cannot_check_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert {row.status for row in parallel.check_parallel(torch.device("cuda"))} == {"not checked"}


def test_the_exit_status_says_whether_something_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(status: Any) -> Any:
        return lambda device: iter([Row("thing", status, "found", "mend it.")])

    monkeypatch.setitem(checks.GROUPS, "decoding", check("ok"))
    assert checks.main(["--only", "decoding"]) == 0
    monkeypatch.setitem(checks.GROUPS, "decoding", check("failed"))
    assert checks.main(["--only", "decoding", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.partition("\n1 ok\n")[2])[0]["status"] == "failed"


@pytest.mark.parametrize("groups", ["", "decoding,", "decoder"])
def test_unknown_groups_are_refused(groups: str) -> None:
    with pytest.raises(ConfigError, match=f"installation, operations, .* not '{groups}'"):
        checks.main(["--only", groups])


@pytest.mark.slow
def test_the_tool_checks_everything() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "doctor.py", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["TP + SP + ZeRO-2 step"]["status"] == "ok"
    assert "4 ranks over gloo" in rows["all-reduce"]["found"]
