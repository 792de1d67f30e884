"""What a plan asks for besides GPUs: time, images, decoding cores, storage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nepa.config import PretrainingConfig
from megatron_nepa.planning.cluster import GPUS_PER_NODE
from megatron_nepa.planning.layout import FP32
from megatron_nepa.planning.plan import Plan
from megatron_nepa.planning.stacks import count_all

IMAGES_PER_CORE = 862.0  # decoded, cropped and resized on a core of an EPYC (Zen 4; tools/RESULTS.md)
IMAGE_BYTES = 108e3  # mean JPEG of ImageNet's training archive: 138 GB of 1,281,167 images


@dataclass(frozen=True)
class Requirements:
    """What the whole run takes, and what each node must be given.

    Attributes:
        steps: optimizer steps.
        images: seen in all.
        days: of training, without stops, saves and evaluations.
        gpu_hours: hours of all GPUs together.
        images_per_node: a second.
        read_bytes_per_node: bytes/s of ImageNet-like JPEGs.
        cores_per_node: CPU cores that decode, where no GPU does.
        checkpoint_bytes: of one checkpoint: masters, two moments, and the average where there is one.
    """

    steps: int
    images: int
    days: float
    gpu_hours: float
    images_per_node: float
    read_bytes_per_node: float
    cores_per_node: float
    checkpoint_bytes: float


def requirements(run: PretrainingConfig, plan: Plan, num_images: int) -> Requirements:
    """What ``plan`` asks for.

    Args:
        run: the config that was planned.
        plan: one of its plans.
        num_images: of the data set, for a run that is set in epochs.
    """
    steps = run.total_steps(num_images)
    hours = steps * plan.time.total / 3600
    nodes = max(1, plan.layout.gpus / GPUS_PER_NODE)
    rate = plan.images_per_second / nodes
    tensors = 3 + (run.optimizer.ema_decay > 0)
    return Requirements(
        steps=steps,
        images=steps * run.global_batch_size,
        days=hours / 24,
        gpu_hours=hours * plan.layout.gpus,
        images_per_node=rate,
        read_bytes_per_node=rate * IMAGE_BYTES,
        cores_per_node=rate / IMAGES_PER_CORE,
        checkpoint_bytes=FP32 * tensors * count_all(run.model, 1, run.objective).local,
    )
