"""Recipes of linear probing: MAE's settings (He et al. 2022, appendix A.1), and one for the quickstart's trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_nepa.config import DataConfig, OptimizerConfig, ProbingConfig
from megatron_nepa.recipes.pretraining import nepa_b, nepa_b_release, nepa_l, nepa_l_release, quickstart


def imagenet_probe_b() -> ProbingConfig:
    """NEPA-B on ImageNet-1K: LARS, batch 16,384, 90 epochs, on the last token."""
    return ProbingConfig(
        recipe="imagenet_probe_b",
        model=nepa_b().model,
        data=DataConfig(horizontal_flip=True),
        optimizer=OptimizerConfig(
            name="lars",
            base_lr=0.1,
            warmup_ratio=10 / 90,
            weight_decay=0.0,
            clip_grad=0.0,
            ema_decay=0.0,
            ema_warmup=True,  # of an average that a flag switches on
        ),
        output_dir="runs/imagenet_probe_b",
        epochs=90,
        global_batch_size=16384,
        micro_batch_size=512,
        # of the head; a probe keeps no average
        init_weights="raw",
    )


def imagenet_probe_l() -> ProbingConfig:
    """NEPA-L on ImageNet-1K, as the probe of B."""
    return replace(
        imagenet_probe_b(),
        recipe="imagenet_probe_l",
        model=nepa_l().model,
        output_dir="runs/imagenet_probe_l",
    )


def imagenet_probe_b_release() -> ProbingConfig:
    """The probe of B on a trunk of the authors' code."""
    return replace(
        imagenet_probe_b(),
        recipe="imagenet_probe_b_release",
        model=nepa_b_release().model,
        output_dir="runs/imagenet_probe_b_release",
    )


def imagenet_probe_l_release() -> ProbingConfig:
    """The probe of L on a trunk of the authors' code."""
    return replace(
        imagenet_probe_b(),
        recipe="imagenet_probe_l_release",
        model=nepa_l_release().model,
        output_dir="runs/imagenet_probe_l_release",
    )


def quickstart_probe() -> ProbingConfig:
    """The quickstart's trunk on a few labelled images: 200 steps of 64, sized for CPU cores."""
    base, start = imagenet_probe_b(), quickstart()
    return replace(
        base,
        recipe="quickstart_probe",
        model=start.model,
        # LARS is for large batches; the rate is 1e-2 after scaling
        optimizer=replace(base.optimizer, name="adamw", base_lr=4e-2, warmup_ratio=0.1),
        output_dir="runs/quickstart_probe",
        steps=200,
        epochs=None,
        global_batch_size=64,
        micro_batch_size=64,
        dtype=start.dtype,
        save_every=100,
        log_every=1,
    )


PROBING_RECIPES: dict[str, Callable[[], ProbingConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        imagenet_probe_b,
        imagenet_probe_l,
        imagenet_probe_b_release,
        imagenet_probe_l_release,
        quickstart_probe,
    )
}
