"""Recipes of fine-tuning to ADE20K: mmsegmentation's for MAE, which the paper names without listing it (section 4.3).

A patch of 14 does not divide mmsegmentation's crop of 512: the crop is 518 pixels (37 x 37 patches), and images are
scaled to a shorter side of 518. ``--model.image_size 504`` takes 36 x 36 patches instead, and ``--model.patch_size 16
--model.image_size 512`` the crop of 512 with a patch embedding that is resampled from 14 to 16 pixels.

``quickstart_upernet`` follows pre-training's quickstart, with crops of its image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_nepa.config import (
    LayerDecayConfig,
    ModelConfig,
    OptimizerConfig,
    SegmentationConfig,
    SegmentationEvaluationConfig,
)
from megatron_nepa.recipes.pretraining import nepa_b, nepa_b_release, nepa_l, nepa_l_release, quickstart

STEPS = 160_000
BATCH = 16
LEARNING_RATE = 1e-4


def ade20k_upernet_b() -> SegmentationConfig:
    """NEPA-B to ADE20K with UPerNet: crops of 518, 160,000 steps of 16 images, layer decay 0.65."""
    return SegmentationConfig(
        recipe="ade20k_upernet_b",
        model=_bidirectional(nepa_b().model, drop_path=0.1),
        optimizer=OptimizerConfig(
            base_lr=LEARNING_RATE * 256 / BATCH,
            decay="linear",
            warmup_ratio=1500 / STEPS,
            beta2=0.999,
            clip_grad=0.0,
            ema_decay=0.0,
            ema_warmup=True,  # of an average that a flag switches on
        ),
        layer_decay=LayerDecayConfig(rate=0.65),
        evaluation=SegmentationEvaluationConfig(every=16_000, stride=341),
        output_dir="runs/ade20k_upernet_b",
        steps=STEPS,
        global_batch_size=BATCH,
        micro_batch_size=2,
        save_every=2000,
        log_every=50,
    )


def ade20k_upernet_l() -> SegmentationConfig:
    """NEPA-L to ADE20K with UPerNet: as B, drop path 0.2."""
    return _other(ade20k_upernet_b(), "ade20k_upernet_l", nepa_l().model, drop_path=0.2)


def ade20k_upernet_b_release() -> SegmentationConfig:
    """NEPA-B to ADE20K from the trunk that the authors' code trains."""
    return _other(ade20k_upernet_b(), "ade20k_upernet_b_release", nepa_b_release().model, drop_path=0.1)


def ade20k_upernet_l_release() -> SegmentationConfig:
    """NEPA-L to ADE20K from the trunk that the authors' code trains."""
    return _other(ade20k_upernet_b(), "ade20k_upernet_l_release", nepa_l_release().model, drop_path=0.2)


def quickstart_upernet() -> SegmentationConfig:
    """The quickstart's trunk with UPerNet on a few masks: 200 steps of 8 crops of 112, sized for CPU cores."""
    base, start = ade20k_upernet_b(), quickstart()
    return replace(
        base,
        recipe="quickstart_upernet",
        model=replace(start.model, causal=False),
        optimizer=replace(base.optimizer, base_lr=1e-3 * 256 / 8, warmup_ratio=0.1),
        evaluation=SegmentationEvaluationConfig(),
        output_dir="runs/quickstart_upernet",
        steps=200,
        global_batch_size=8,
        micro_batch_size=8,
        dtype=start.dtype,
        save_every=100,
        log_every=1,
    )


def _other(base: SegmentationConfig, recipe: str, model: ModelConfig, drop_path: float) -> SegmentationConfig:
    return replace(base, recipe=recipe, model=_bidirectional(model, drop_path), output_dir=f"runs/{recipe}")


def _bidirectional(model: ModelConfig, drop_path: float) -> ModelConfig:
    # mmsegmentation scales images at random, and nothing else: no RoPE rescale as in the release's pre-training
    return replace(model, image_size=518, causal=False, drop_path=drop_path, rope_rescale=None)


SEGMENTATION_RECIPES: dict[str, Callable[[], SegmentationConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        ade20k_upernet_b,
        ade20k_upernet_l,
        ade20k_upernet_b_release,
        ade20k_upernet_l_release,
        quickstart_upernet,
    )
}
