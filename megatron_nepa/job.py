"""From the command line of a training script to what every task needs to start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from megatron_nepa.cli import Recipes, parse_command_line
from megatron_nepa.config import Run
from megatron_nepa.kernels.dispatch import Kernels, select_kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology, build_topology, init_distributed
from megatron_nepa.training.engine.deepspeed_config import merge, read_ds_config


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
    command = parse_command_line(arguments, description, recipes)
    ds_config = read_ds_config(command.ds_config)
    run = merge(command.run, command.given, command.ds_config, ds_config)

    topology = build_topology(init_distributed(), run.parallel.tensor_parallel_size)
    model = run.model
    heads = model.num_heads // topology.tensor.size
    kernels = select_kernels(
        run.kernels,
        topology.device,
        attention_shape=(run.micro_batch_size, model.sequence_length, heads, model.head_size),
        dtype=DTYPES[run.dtype],
        causal=model.causal,
    )
    return Job(run, ds_config, kernels, topology)
