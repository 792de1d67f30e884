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

from megatron_nepa.job import start_job
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.training.stopping.process import exit_on_user_error


def main(arguments: Sequence[str]) -> None:
    """Parse, build, train."""
    job = start_job(arguments, __doc__ or "", PRETRAINING_RECIPES)

    # imported once the flags are known to be good: they bring torch, which takes seconds
    from megatron_nepa.tasks.pretraining import PretrainingTask
    from megatron_nepa.training.train import train

    task = PretrainingTask(job.run, job.topology)
    train(job.run, job.ds_config, task, job.kernels, job.topology)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
