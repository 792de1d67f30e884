"""The dtype of a run that leaves it to the machine."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Literal

import torch

from megatron_nepa.checkpoint.described import describe_checkpoint
from megatron_nepa.checkpoint.following import newest_described
from megatron_nepa.checkpoint.format.agreement import on_all_ranks
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.config import ConfigError, Run, RunConfig
from megatron_nepa.parallel.topology import Topology

Dtype = Literal["bf16", "fp32"]


def settle_dtype(run: Run, topology: Topology) -> Run:
    """The run with a dtype in the place of ``auto``, which the main rank chooses; every rank calls it.

    A run that is continued keeps the dtype that it began with, on whatever machine.
    """
    if run.dtype != "auto":
        return run

    def choose() -> tuple[Dtype, str] | None:
        if not topology.is_main:
            return None
        begun = begun_with(run)
        return fastest_dtype(topology.device) if begun is None else (begun, "as the run began")

    dtype, why = next(filter(None, on_all_ranks(topology, choose)))
    if topology.is_main:
        print(f"--dtype auto: {dtype}, {why}", flush=True)
    return replace(run, dtype=dtype)


def begun_with(run: RunConfig) -> Dtype | None:
    """The dtype of the checkpoint that a run would continue; None where it starts."""
    if run.resume == "none":
        return None
    with contextlib.suppress(ConfigError, OSError):  # which the run will say when it looks for its checkpoint
        found = newest_described(run.output_dir)
        if found is None and run.resume != "auto":
            found = str(find_checkpoint(run.resume))
        if found is not None:
            dtype: Dtype | None = describe_checkpoint(found).settings.get("dtype")
            return dtype
    return None


def fastest_dtype(device: torch.device) -> tuple[Dtype, str]:
    """bf16 where ``device`` has units that multiply it, else fp32; and why.

    Of CPUs those with AVX512-BF16 have, among them all with AMX; the others would convert to fp32 and back.
    """
    if device.type == "cuda":
        has_units, name = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        has_units, name = torch.cpu._is_avx512_bf16_supported(), "this CPU"
    return ("bf16", f"for which {name} has units") if has_units else ("fp32", f"since {name} has no units for bf16")
