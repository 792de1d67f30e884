"""Checks find what is planted and name it; without it they pass. Here on a CPU, through the stand-in for CUDA."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nepa.acceptance.check import Check, NotRun, perform
from megatron_nepa.acceptance.device_calls import Cpu, Cuda, StandIn
from megatron_nepa.acceptance.parts import PARTS, decoding, kernels, sanitizer, speed, training, variants
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.setting import Setting, setting
from megatron_nepa.acceptance.steps import Timing
from megatron_nepa.benchmarks.kernels import Timing as KernelTiming
from tests.acceptance import faults
from tests.kernels import flash_attn_stub


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = setting(tmp_path, rehearsal=True)
    assert isinstance(found.calls, StandIn)
    return found


def rows_of(part: str, name: str, here: Setting) -> list[Row]:
    check = next(check for check in PARTS[part].load()(here) if check.name == name)
    return perform(check, has_gpu=True)[0]


Fault = Callable[[pytest.MonkeyPatch], None]
PLANTED: list[tuple[str, str, Fault]] = [
    ("1", "kernel swiglu, toy, fp32", faults.kernel_off_by_one),
    ("1", "kernel swiglu, toy, bf16", faults.kernel_off_by_one),
    ("3", "kernels of toy", faults.slow_kernel),
    ("3", "steps of toy", faults.slow_steps),
    ("4", "pixels on the GPU", faults.decoder_that_shifts),
    ("4", "a pixel and its batch, hw_decoder_load 0.65", faults.decoder_that_looks_at_the_batch),
]


@pytest.mark.parametrize(("part", "name", "fault"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_fails_and_is_named(
    part: str, name: str, fault: Fault, here: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {row.status for row in rows_of(part, name, here)} == {"PASS"}
    fault(monkeypatch)
    rows = rows_of(part, name, here)
    assert {row.status for row in rows} == {"FAIL"}
    assert all(row.remedy and row.name for row in rows)
    if part == "3":
        assert all("slow" in row.meaning for row in rows)
    if fault is faults.kernel_off_by_one:
        assert {row.status for row in rows_of("1", "kernel residual_norm, toy, bf16", here)} == {"PASS"}


@pytest.mark.slow
def test_a_resume_that_differs_fails(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row.status for row in rows_of("2", "resume", here)] == ["PASS"]
    faults.resume_that_differs(monkeypatch)
    (row,) = rows_of("2", "resume", here)
    assert (row.name, row.status) == ("resume", "FAIL")
    assert "2 of 2 steps differ" in row.figure


def timing(rate: float, losses: list[float] | None = None) -> Timing:
    return Timing(8, 8 / rate, 1.0, 0.0, losses or [0.5, 0.4])


def kernel_timing(share: float | None) -> KernelTiming:
    return KernelTiming("swiglu", "triton", None, None if share is None else 1.0, share, "no room" if not share else "")


class _Wrong(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        super().step()


JUDGED: list[tuple[str, Row, str]] = [
    ("equal curves", training.compare("a", [1.0, 0.5], [1.0, 0.51], "b", "c"), "PASS"),
    ("other curves", training.compare("a", [1.0, 0.5], [1.0, 0.53], "b", "c"), "FAIL"),
    ("a short curve", training.compare("a", [1.0, 0.5], [1.0], "b", "c"), "FAIL"),
    ("an exact resume", training.repeated([0.5, 0.4], [0.5, 0.4]), "PASS"),
    ("one bit", training.repeated([0.5, 0.4], [0.5, math.nextafter(0.4, 1)]), "FAIL"),
    ("no resume", training.repeated([0.5, 0.4], []), "FAIL"),
    ("a fast kernel", speed.kernel_row("k", kernel_timing(0.61), [], 0.6), "PASS"),
    ("a slow kernel", speed.kernel_row("k", kernel_timing(0.59), [], 0.6), "FAIL"),
    ("a dead kernel", speed.kernel_row("k", kernel_timing(None), [], 0.6), "FAIL"),
    ("attention", speed.attention_row("a", (256, 257), {"x": [1.0, 1.1], "y": [3.0]}), "PASS"),
    ("attention of odd lengths", speed.attention_row("a", (256, 257), {"x": [1.0, 1.6]}), "FAIL"),
    ("no attention", speed.attention_row("a", (256, 257), {"x": [1.0]}), "FAIL"),
    (
        "a fast peer",
        speed.peer_row("p", {"transformers eager": timing(9), "megatron_nepa eager": timing(8)}, on_cpu=False),
        "FAIL",
    ),
    ("equal verdicts", decoding.verdict_row({"cut": (False, False), "plain": (True, True)}), "PASS"),
    ("other verdicts", decoding.verdict_row({"cut": (False, True), "plain": (True, True)}), "FAIL"),
    ("enough images", decoding.speed_row({(0.0, 2): 90.0, (0.65, 4): 100.0}, "B", 99.0, is_gpu=False), "PASS"),
    ("too few images", decoding.speed_row({(0.0, 2): 90.0, (0.65, 4): 100.0}, "B", 101.0, is_gpu=False), "FAIL"),
    ("AdamW", variants.optimizer_row("o", torch.device("cpu"), torch.optim.AdamW, {}), "PASS"),
    ("two steps in one", variants.optimizer_row("o", torch.device("cpu"), _Wrong, {}), "FAIL"),
    ("a skipped step", variants.non_finite_row([1.0, 0.9, math.nan, 0.8, 0.7, 0.6]), "PASS"),
    ("weights that are lost", variants.non_finite_row([1.0, 0.9, math.nan, math.nan, math.nan, math.nan]), "FAIL"),
    ("checkpointing", variants.checkpointing_row("full", timing(9), timing(8)), "PASS"),
    ("other losses", variants.checkpointing_row("full", timing(9), timing(8, [0.5, 0.3])), "FAIL"),
]


@pytest.mark.parametrize(("row", "status"), [(row, status) for _, row, status in JUDGED], ids=[j[0] for j in JUDGED])
def test_judgements(row: Row, status: str) -> None:
    assert row.status == status
    assert bool(row.remedy) == (status == "FAIL")


def test_a_missing_package_is_not_run_and_says_what_to_carry_along() -> None:
    def missing() -> list[Row]:
        import nvidia.dalii  # noqa: F401

        return []

    (row,), spoilt = perform(Check("x", 1, missing), has_gpu=True)
    assert (row.status, spoilt) == ("NOT RUN", False)
    assert "nvidia.dalii" in row.figure
    assert row.remedy.startswith("carry along nvidia-dali")


@pytest.mark.parametrize("version", [2, 3, 4])
def test_each_flash_attention_is_judged_by_itself_where_it_is_installed(
    version: int, here: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"FlashAttention-{version}"
    (row,) = rows_of("5", name, here)
    assert (row.status, row.figure) == ("NOT RUN", "not installed")
    assert row.remedy.startswith("carry along flash-attn")
    monkeypatch.setattr(variants, "can_find", lambda module: True)
    (row,) = rows_of("5", name, here)
    assert (row.name, row.status) == (name, "NOT RUN")
    assert "cannot be imported" in row.figure
    if version == 2:
        flash_attn_stub.install(monkeypatch)
    else:
        flash_attn_stub.install_version(monkeypatch, version, with_lse=True)
    (row,) = rows_of("5", name, here)
    assert (row.name, row.status) == (name, "PASS")
    attend = torch.nn.functional.scaled_dot_product_attention
    wrong = {"is_causal": False}  # it sees the tokens that come
    monkeypatch.setattr(
        flash_attn_stub.torch.nn.functional, "scaled_dot_product_attention", lambda *qkv, **o: attend(*qkv, **o | wrong)
    )
    contest = kernels.attention_contest(here)
    contest.contenders = {"sdpa": lambda qkv, causal: causal_products(qkv)}
    monkeypatch.setattr(kernels, "attention_contest", lambda setting: contest)
    (row,) = rows_of("5", name, here)
    assert (row.name, row.status) == (name, "FAIL")
    assert row.remedy


def causal_products(qkv: torch.Tensor) -> torch.Tensor:
    """Causal attention by its definition."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def test_what_needs_a_gpu_is_not_run_without_one_and_cuda_errors_spoil_the_process() -> None:
    def broken() -> list[Row]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    (row,), _ = perform(Check("x", 1, broken), has_gpu=False)
    assert (row.status, row.figure) == ("NOT RUN", "needs a GPU")
    (row,), spoilt = perform(Check("x", 1, broken), has_gpu=True)
    assert (row.status, spoilt) == ("FAIL", True)


def test_the_sanitizer_is_not_run_where_it_lacks_and_what_it_finds_fails(
    here: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = dataclasses.replace(here, calls=Cpu())
    with pytest.raises(NotRun, match="not installed"):
        list(sanitizer.memcheck(without, "swiglu"))
    finds = "import sys; print('========= ERROR SUMMARY: 3 errors'); sys.exit(9)"
    monkeypatch.setattr(StandIn, "sanitizer", lambda self: [sys.executable, "-c", finds])
    (row,) = sanitizer.memcheck(here, "swiglu")
    assert (row.status, row.figure) == ("FAIL", "ERROR SUMMARY: 3 errors")


def test_the_stand_in_has_every_call_and_only_those() -> None:
    def names(kind: type[Cuda]) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(StandIn) == names(Cuda)


@pytest.mark.parametrize("part", PARTS)
def test_names_of_checks_are_unique_and_each_fits_its_part(part: str, here: Setting) -> None:
    checks = PARTS[part].load()(here)
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.seconds <= PARTS[part].seconds for check in checks)


def test_all_parts_fit_in_25_minutes_and_the_first_in_3() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= 25 * 60
    assert PARTS["1"].seconds <= 3 * 60
    assert kernels.NEEDED_BY
