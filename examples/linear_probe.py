"""Probe a frozen NEPA trunk: a linear classifier on its features, or nearest neighbours.

    deepspeed examples/linear_probe.py --trunk runs/nepa_b --data /data/imagenet/train \\
        --validation_data /data/imagenet/val
    deepspeed examples/linear_probe.py --trunk runs/nepa_b --data /data/imagenet/train \\
        --validation_data /data/imagenet/val --trunk.block 8 --trunk.pooling mean --knn 20
    python examples/linear_probe.py --trunk runs/nepa_b --evaluate_only --validation_data /data/imagenet/val

--trunk takes a run of any grid, any task's included, or a converted or released model (its folder); --trunk.weights
chooses its average or its raw weights. The linear layer is trained by LARS as MAE's, evaluated once an epoch, and saved
without the trunk. --knn trains nothing. --evaluate_only evaluates the layer in --output_dir, or that of --init_from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_nepa.job import start_job
from megatron_nepa.recipes import PROBING_RECIPES
from megatron_nepa.training.stopping.process import exit_on_user_error


def main(arguments: Sequence[str]) -> None:
    """Parse, build, train or evaluate."""
    job = start_job(arguments, __doc__ or "", PROBING_RECIPES)

    # imported once the flags are known to be good: they bring torch, which takes seconds
    from megatron_nepa.tasks.probing import ProbingTask, evaluate_neighbours
    from megatron_nepa.training.evaluation import evaluate_only
    from megatron_nepa.training.train import train

    task = ProbingTask(job.run, job.topology, job.kernels)
    if task.run.knn is not None:
        evaluate_neighbours(task)
    elif task.run.evaluation.only:
        evaluate_only(task.run, task, job.kernels, job.topology)
    else:
        train(task.run, job.ds_config, task, job.kernels, job.topology)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
