"""A run that leaves its dtype to the machine: one choice for all ranks, kept where the run goes on elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.training.dtype import begun_with, fastest_dtype
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain

FLAGS = [*TINY, "--dtype=auto", "--save_every=1"]


def train(flags: list[str], has_units: tuple[bool, ...]) -> tuple[str | None, str]:
    """The run's error and the line that tells its dtype, on a rank whose CPU has units for bf16 or not."""
    mine = has_units[dist.get_rank()]
    torch.cpu._is_avx512_bf16_supported = lambda: mine
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        error = pretrain(flags)
    return error, next((line for line in said.getvalue().splitlines() if line.startswith("--dtype auto")), "")


def trained_in(output: Path) -> str:
    return str(json.loads((output / "config.json").read_text())["run"]["dtype"])


@pytest.mark.parametrize("has_units", [True, False])
def test_a_run_keeps_what_the_main_ranks_cpu_multiplied_fastest(has_units: bool, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = [*FLAGS, f"--data={make_images(tmp_path / 'images')}"]
    first = partial(train, [*flags, f"--output_dir={output}", "--steps=1"], (has_units, not has_units))
    dtype = "bf16" if has_units else "fp32"
    (error, said), (other_error, silent) = run_ranks(2, first)
    assert (error, other_error, silent) == (None, None, "")
    assert said.startswith(f"--dtype auto: {dtype}, ")
    assert trained_in(output) == dtype

    # goes on on another CPU, in its folder or from its checkpoint
    here = replace(PRETRAINING_RECIPES["quickstart"](), output_dir=str(output))
    there = replace(here, output_dir=str(tmp_path / "another"))
    assert begun_with(here) == dtype
    assert begun_with(replace(there, resume=str(output))) == dtype
    for resume in ("auto", "none", "no/such/checkpoint", "a" * 300):
        assert begun_with(replace(there, resume=resume)) is None
    assert begun_with(replace(there, output_dir="a" * 300)) is None  # which is refused later, in one sentence
    if has_units:
        flags += [f"--output_dir={there.output_dir}", f"--resume={output}", "--steps=2"]
        assert run_ranks(1, partial(train, flags, (False,)))[0] == (None, "--dtype auto: bf16, as the run began")


def test_a_gpu_without_bf16_gets_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert fastest_dtype(torch.device("cuda")) == ("fp32", "since Tesla V100 has no units for bf16")
