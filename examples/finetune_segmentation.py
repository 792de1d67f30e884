"""Fine-tune a pre-trained NEPA trunk to semantic segmentation with UPerNet, or evaluate a segmenter.

    deepspeed examples/finetune_segmentation.py --ds_config ds_configs/zero2.json --recipe ade20k_upernet_b \\
        --init_from runs/nepa_b --data /data/ADEChallengeData2016 --validation_data /data/ADEChallengeData2016
    deepspeed examples/finetune_segmentation.py --init_from runs/nepa_b --data pairs/train \\
        --validation_data pairs/val --masks.num_classes 21 --masks.reduce_zero_label false
    python examples/finetune_segmentation.py --evaluate_only --init_from runs/ade20k_upernet_b \\
        --validation_data /data/ADEChallengeData2016 --output_dir runs/ade20k_evaluation

--data and --validation_data take a folder with images/ and annotations/, in ADE20K's own layout (training/ and
validation/ in both) or with the pairs right inside, Cityscapes' or Pascal VOC's folder, or an index that
tools/index_dataset.py wrote. A mask is a PNG of one channel with its image's name and size, a number for each pixel; a
classes.txt beside images/ names the classes. The scores of every class and some pictures go to OUTPUT_DIR/segmentation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_nepa.job import start_job
from megatron_nepa.recipes import SEGMENTATION_RECIPES
from megatron_nepa.training.stopping.process import exit_on_user_error


def main(arguments: Sequence[str]) -> None:
    """Parse, build, train or evaluate."""
    job = start_job(arguments, __doc__ or "", SEGMENTATION_RECIPES)

    # imported once the flags are known to be good: they bring torch, which takes seconds
    from megatron_nepa.tasks.segmentation import SegmentationTask
    from megatron_nepa.training.evaluation import evaluate_only
    from megatron_nepa.training.train import train

    task = SegmentationTask(job.run, job.topology)
    if job.run.evaluation.only:
        evaluate_only(job.run, task, job.kernels, job.topology)
    else:
        train(job.run, job.ds_config, task, job.kernels, job.topology)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
