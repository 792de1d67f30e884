"""Fine-tune a pre-trained NEPA trunk to image classification, or evaluate a classifier.

    deepspeed examples/finetune_classification.py --ds_config ds_configs/zero2.json --recipe imagenet_ft_b \\
        --init_from runs/nepa_b --data /data/imagenet/train --validation_data /data/imagenet/val
    python examples/finetune_classification.py --recipe imagenet_ft_l_release --evaluate_only \\
        --init_from nepa-large-patch14-224-sft --validation_data /data/imagenet/val

--data and --validation_data take a folder for each class, or an index that tools/index_dataset.py wrote. --init_from
takes a pre-training run of any grid, a converted or released model (its folder), or another classifier; without it the
network is trained from scratch. The raw weights and their average are evaluated once an epoch, and the checkpoint that
was best is kept beside the newest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_nepa.job import start_job
from megatron_nepa.recipes import CLASSIFICATION_RECIPES
from megatron_nepa.training.stopping.process import exit_on_user_error


def main(arguments: Sequence[str]) -> None:
    """Parse, build, train or evaluate."""
    job = start_job(arguments, __doc__ or "", CLASSIFICATION_RECIPES)

    # imported once the flags are known to be good: they bring torch, which takes seconds
    from megatron_nepa.tasks.classification import ClassificationTask
    from megatron_nepa.training.evaluation import evaluate_only
    from megatron_nepa.training.train import train

    task = ClassificationTask(job.run, job.topology)
    if job.run.evaluation.only:
        evaluate_only(job.run, task, job.kernels, job.topology)
    else:
        train(job.run, job.ds_config, task, job.kernels, job.topology)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
