"""Predictions beside published runs: how far off the planner is, where anybody measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_nepa.config import ModelConfig, PretrainingConfig
from megatron_nepa.planning.cluster import GPUS
from megatron_nepa.planning.plan import Plan, find_plans
from megatron_nepa.recipes import PRETRAINING_RECIPES

IMAGENET_IMAGES = 1_281_167
SECONDS_OF_A_DAY = 86400

# ViT-g/14 (Zhai et al. 2022): GELU, class token, learned positions
VIT_G = ModelConfig(
    hidden_size=1408,
    num_layers=40,
    num_heads=16,
    mlp="gelu",
    mlp_hidden_size=6144,
    qk_norm="none",
    rope=False,
    bos_token=True,
    layer_scale_init=None,
    causal=False,
)
# ViT-L/16 (Dosovitskiy et al. 2021), 197 tokens
VIT_L = replace(VIT_G, patch_size=16, hidden_size=1024, num_layers=24, mlp_hidden_size=4096)
NEMO = "NeMo Megatron ViT-g/14, docs.nvidia.com NeMo Vit/Perf.html"
STABLE = "stable-pretraining ViT-L/16 compiled, its benchmarks/imagenet10/RESULTS.md"
AUTHORS = "the authors, github.com/SihanXU/nepa issue 2: NEPA-B, 1,600 epochs"


@dataclass(frozen=True)
class Anchor:
    """A published throughput.

    Attributes:
        source: who measured, and where it is written.
        gpu: key of ``GPUS``.
        gpus: how many.
        images_per_second: throughput of the whole run; every view of an image counts.
        plan: the planner's best for the same model and number of GPUs.
    """

    source: str
    gpu: str
    gpus: int
    images_per_second: float
    plan: Plan

    @property
    def ratio(self) -> float:
        """Predicted over published throughput: 1 where the planner is right, above 1 where it is too hopeful."""
        return self.plan.images_per_second / self.images_per_second


def validate() -> list[Anchor]:
    """Predict every published run.

    Their batch sizes are not published (NeMo) or the recipe's (the authors, who name a range of days): the planner
    takes 4,096 images a step, and its best layout. Of stable-pretraining's run, two views of 384 images a step, the
    planner has the trunk without the projector, and no data loading, which the published rate includes.

    V-JEPA 2's published times of a step are left out: the planner knows images, not clips of 2,048 tokens of which two
    views with masks of different shares pass the encoder.
    """
    vit_g = replace(PRETRAINING_RECIPES["nepa_g"](), model=VIT_G)
    nepa_b = PRETRAINING_RECIPES["nepa_b_release"]()
    images = 1600 * IMAGENET_IMAGES
    found = []
    for gpu, gpus, rate in (("h100", 8, 1428.0), ("h100", 128, 21561.0), ("a100", 8, 693.0), ("a100", 128, 10644.0)):
        found.append(_anchor(NEMO, vit_g, gpu, gpus, rate))
    views = 2 * 384
    found.append(_anchor(STABLE, replace(vit_g, model=VIT_L, global_batch_size=views), "h200", 1, 2 * 480.9))
    for gpus, days in ((8, 3), (8, 5), (16, 2), (16, 3)):
        rate = images / (days * SECONDS_OF_A_DAY)
        found.append(_anchor(f"{AUTHORS} in {days} days", nepa_b, "h100", gpus, rate))
    return found


def _anchor(source: str, run: PretrainingConfig, gpu: str, gpus: int, images_per_second: float) -> Anchor:
    return Anchor(source, gpu, gpus, images_per_second, find_plans(run, gpus, GPUS[gpu])[0])


def format_validation(anchors: list[Anchor]) -> str:
    """A line an anchor."""
    lines = [f"{'GPUs':>11}{'published':>11}{'predicted':>11}{'ratio':>7}{'MFU':>8}{'MFU here':>10}  run"]
    for anchor in anchors:
        mfu = anchor.plan.mfu / anchor.ratio
        lines.append(
            f"{anchor.gpus:>4} x {anchor.gpu:<4}{anchor.images_per_second:>11,.0f}"
            f"{anchor.plan.images_per_second:>11,.0f}{anchor.ratio:>7.2f}{mfu:>8.1%}{anchor.plan.mfu:>10.1%}"
            f"  {anchor.source}"
        )
    return "\n".join(lines)
