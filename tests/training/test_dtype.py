"""A run that leaves its dtype to the machine: one choice for all ranks, kept where the run goes on elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_nepa.training.dtype import fastest_dtype
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
def test_a_run_starts_in_what_the_main_ranks_cpu_multiplies_fastest(has_units: bool, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = [*FLAGS, f"--data={make_images(tmp_path / 'images')}", f"--output_dir={output}"]
    both = (has_units, not has_units)
    told = run_ranks(2, partial(train, [*flags, "--steps=1"], both))
    dtype = "bf16" if has_units else "fp32"
    assert [error for error, _ in told] == [None, None]
    assert told[0][1].startswith(f"--dtype auto: {dtype}, ")
    assert told[1][1] == ""
    assert trained_in(output) == dtype

    # its folder on other CPUs, and another run that starts from its checkpoint
    elsewhere = (not has_units,)
    begun = (None, f"--dtype auto: {dtype}, as the run began")
    assert run_ranks(1, partial(train, [*flags, "--steps=1"], elsewhere))[0] == begun
    another = tmp_path / "another"
    flags = [*flags, "--steps=2", f"--resume={output}", f"--output_dir={another}"]
    assert run_ranks(1, partial(train, flags, elsewhere))[0] == begun
    assert trained_in(another) == dtype


def test_a_gpu_without_bf16_gets_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert fastest_dtype(torch.device("cuda")) == ("fp32", "since Tesla V100 has no units for bf16")
