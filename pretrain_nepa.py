"""Pre-train NEPA: a causal Vision Transformer that predicts the embedding of the next image patch.

    deepspeed pretrain_nepa.py --ds_config ds_configs/zero2.json
    deepspeed pretrain_nepa.py --ds_config ds_configs/zero2.json --recipe nepa_b --data /data/imagenet/train
    deepspeed pretrain_nepa.py --ds_config ds_configs/zero2.json --recipe nepa_7b --data /data/imagenet/train \\
        --tensor_parallel_size 8 --sequence_parallel --activation_checkpointing

Without --data it trains on photographs that come with the installed packages. The same command continues a run that was
stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_nepa.cli import parse_command_line
from megatron_nepa.kernels.dispatch import select_kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import build_topology, init_distributed
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.tasks.pretraining import PretrainingTask
from megatron_nepa.training.deepspeed_config import merge, read_ds_config, resolve
from megatron_nepa.training.launch import exit_on_user_error
from megatron_nepa.training.loop import train


def main(arguments: Sequence[str]) -> None:
    """Parse, build, train."""
    command = parse_command_line(arguments, __doc__ or "", PRETRAINING_RECIPES)
    ds_config = read_ds_config(command.ds_config)
    run = merge(command.run, command.given, command.ds_config, ds_config)

    topology = build_topology(init_distributed(), run.parallel.tensor_parallel_size)
    ds_config = resolve(run, ds_config, topology.data_size)
    task = PretrainingTask(run, topology)
    model = run.model
    attention_shape = (
        run.micro_batch_size,
        model.sequence_length,
        model.num_heads // topology.tensor.size,
        model.head_size,
    )
    kernels = select_kernels(
        run.kernels, topology.device, attention_shape=attention_shape, dtype=DTYPES[run.dtype], causal=model.causal
    )
    train(run, ds_config, task, kernels, topology)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
