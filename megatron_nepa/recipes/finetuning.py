"""Recipes of fine-tuning to image classification.

``imagenet_ft_b`` and ``imagenet_ft_l`` follow the paper (table 5), the ``_release`` ones the authors' scripts where the
two differ (docs/paper_and_release.md lists every difference). ``quickstart_ft`` follows pre-training's quickstart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_nepa.config import (
    AugmentationConfig,
    ClassificationConfig,
    DataConfig,
    EvaluationConfig,
    HeadConfig,
    LayerDecayConfig,
    ModelConfig,
    OptimizerConfig,
)
from megatron_nepa.recipes.pretraining import nepa_b, nepa_b_release, nepa_l, nepa_l_release, quickstart


def imagenet_ft_b() -> ClassificationConfig:
    """NEPA-B to ImageNet-1K as in the paper: causal, last token, layer decay growing from 0.35 to 1."""
    return ClassificationConfig(
        recipe="imagenet_ft_b",
        model=_finetuned(nepa_b().model, drop_path=0.1),
        # the crop's flip is part of the augmentation that the paper takes from MAE
        data=DataConfig(horizontal_flip=True),
        # the average would stay the untrained head in a short run, where --steps or --epochs makes it one
        optimizer=OptimizerConfig(base_lr=1e-3, beta2=0.999, warmup_ratio=5 / 100, ema_warmup=True),
        layer_decay=LayerDecayConfig(rate=0.35, rate_end=1.0),
        augmentation=AugmentationConfig(random_erasing=0.0),
        output_dir="runs/imagenet_ft_b",
        epochs=100,
        global_batch_size=1024,
        micro_batch_size=128,
    )


def imagenet_ft_l() -> ClassificationConfig:
    """NEPA-L to ImageNet-1K as in the paper: 50 epochs, layer decay growing from 0.60 to 1."""
    base = imagenet_ft_b()
    return replace(
        base,
        recipe="imagenet_ft_l",
        model=_finetuned(nepa_l().model, drop_path=0.2),
        optimizer=replace(base.optimizer, warmup_ratio=5 / 50),
        layer_decay=LayerDecayConfig(rate=0.60, rate_end=1.0),
        output_dir="runs/imagenet_ft_l",
        epochs=50,
        micro_batch_size=64,
    )


def imagenet_ft_b_release() -> ClassificationConfig:
    """NEPA-B to ImageNet-1K as the authors' script: bidirectional, mean of patches, fixed layer decay 0.65."""
    base = imagenet_ft_b()
    return replace(
        base,
        recipe="imagenet_ft_b_release",
        # the authors' fine-tuned configs have an affine QK-norm, whose missing weights start as ones
        model=_finetuned(replace(nepa_b_release().model, qk_norm="affine"), 0.1, base.micro_batch_size, causal=False),
        optimizer=replace(base.optimizer, base_lr=1.5e-3, warmup_ratio=0.2, decay_bos_token=True),
        layer_decay=LayerDecayConfig(rate=0.65, convention="release", layerwise_warmup=True, head_lr=1e-3),
        head=HeadConfig(pooling="mean"),
        augmentation=AugmentationConfig(),
        output_dir="runs/imagenet_ft_b_release",
    )


def imagenet_ft_l_release() -> ClassificationConfig:
    """NEPA-L to ImageNet-1K as the authors' script: 100 epochs, fixed layer decay 0.75, squashed evaluation images."""
    base = imagenet_ft_b_release()
    return replace(
        base,
        recipe="imagenet_ft_l_release",
        model=_finetuned(nepa_l_release().model, 0.2, 64, causal=False),
        optimizer=replace(base.optimizer, base_lr=1e-3, warmup_ratio=0.3),
        layer_decay=replace(base.layer_decay, rate=0.75),
        evaluation=EvaluationConfig(resize_size=235, squash=True),
        output_dir="runs/imagenet_ft_l_release",
        micro_batch_size=64,
    )


def quickstart_ft() -> ClassificationConfig:
    """The quickstart's trunk to a few labelled images: 200 steps of 32, sized for CPU cores."""
    start = quickstart()
    return ClassificationConfig(
        recipe="quickstart_ft",
        model=_finetuned(start.model, drop_path=0.0),
        data=start.data,
        optimizer=replace(start.optimizer, base_lr=8e-3),  # 1e-3 after scaling
        layer_decay=LayerDecayConfig(rate=0.65),
        # mixing and RandAugment need more steps than these to pay
        augmentation=AugmentationConfig(rand_augment=None, random_erasing=0.0, mixup=0.0, cutmix=0.0),
        output_dir="runs/quickstart_ft",
        steps=200,
        global_batch_size=32,
        micro_batch_size=32,
        dtype=start.dtype,
        save_every=100,
        log_every=1,
    )


def _finetuned(model: ModelConfig, drop_path: float, rescale_group: int = 1, causal: bool = True) -> ModelConfig:
    return replace(
        model, drop_path=drop_path, freeze_patch_embedding=True, causal=causal, rope_rescale_group=rescale_group
    )


CLASSIFICATION_RECIPES: dict[str, Callable[[], ClassificationConfig]] = {
    recipe.__name__: recipe
    for recipe in (imagenet_ft_b, imagenet_ft_l, imagenet_ft_b_release, imagenet_ft_l_release, quickstart_ft)
}
