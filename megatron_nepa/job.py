"""From the command line of a training script to what every task needs to start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

from megatron_nepa.cli import Recipes, parse_command_line
from megatron_nepa.config import Run, RunConfig, flag_of
from megatron_nepa.imports import lasting_imports
from megatron_nepa.parallel.launcher import ranks_of_this_node, speaks_for_its_node
from megatron_nepa.training.engine.deepspeed_config import merge, read_ds_config
from megatron_nepa.training.reporting.waiting import waiting_for

if TYPE_CHECKING:
    from megatron_nepa.kernels.dispatch import Kernels
    from megatron_nepa.parallel.topology import Topology


@dataclass(frozen=True)
class Job(Generic[Run]):
    """A run and this rank's place in it.

    Attributes:
        run: recipe, flags and the numbers that the DeepSpeed config fixes.
        ds_config: the DeepSpeed config as it was read.
        kernels: implementations of the fused operations.
        topology: this rank's place.
    """

    run: Run
    ds_config: dict[str, Any]
    kernels: Kernels
    topology: Topology


def start_job(arguments: Sequence[str], description: str, recipes: Recipes[Run]) -> Job[Run]:
    """Read the flags, join the other ranks and choose the kernels; every rank calls it.

    Args:
        arguments: command line, as in ``sys.argv[1:]``.
        description: what the script does, for ``--help``.
        recipes: those of the script's task; the first is the default.

    Raises:
        ConfigError: for settings that cannot work.
    """
    command = parse_command_line(arguments, description, recipes, _follow)
    ds_config = read_ds_config(command.ds_config)
    run = merge(command.run, command.given, command.ds_config, ds_config)

    with lasting_imports("torch"):  # here: --help and a mistake in the flags do not wait for torch
        from megatron_nepa.kernels.dispatch import select_kernels
        from megatron_nepa.models.trunk import DTYPES
        from megatron_nepa.parallel.topology import build_topology, init_distributed
        from megatron_nepa.training.dtype import settle_dtype

    _share_cores()
    _keep_freed_memory()
    with waiting_for("waiting for the other ranks", speaks_for_its_node(os.environ)):
        topology = build_topology(init_distributed(), run.parallel.tensor_parallel_size)
    if command.followed and topology.is_main:
        fields = (f"{flag_of(name)} {str(value).lower()}" for name, value in command.followed.items())
        print(f"as the checkpoint says, not as --recipe {run.recipe}: {', '.join(fields)}", flush=True)
    run = settle_dtype(run, topology)
    model = run.model
    heads = model.num_heads // topology.tensor.size
    kernels = select_kernels(
        run.kernels,
        topology.device,
        attention_shape=(run.micro_batch_size, model.sequence_length, heads, model.head_size),
        head_sizes=run.head_sizes,
        dtype=DTYPES[run.dtype],
        causal=model.causal,
    )
    return Job(run, ds_config, kernels, topology)


def _follow(run: RunConfig, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the checkpoint says that the flags name."""
    if not any(given.get(name) for name in ("init_from", "trunk.path", "evaluation.only")):
        return {}  # without waiting for torch
    from megatron_nepa.checkpoint.following import follow_checkpoint

    return follow_checkpoint(run, given)


def _share_cores() -> None:
    """On a CPU, divide the cores between the ranks of this node, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_of_this_node(os.environ)))


def _keep_freed_memory() -> None:
    """On a CPU, let the next step reuse what the last one freed, unless the environment sets glibc's allocator.

    As it is, glibc returns a large tensor to the system when it is freed, and the next one's pages are zeroed anew: a
    twentieth of a step's time.
    """
    import ctypes

    import torch

    if torch.cuda.is_available() or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(mmap_threshold, 2**26)  # larger ones are few, and would break up what is kept
        mallopt(trim_threshold, -1)  # never
