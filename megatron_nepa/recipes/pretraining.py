"""Recipes of pre-training.

``nepa_b`` and ``nepa_l`` follow the paper, ``nepa_b_release`` and ``nepa_l_release`` the authors' code where the two
differ (docs/paper_and_release.md lists every difference); the larger trunks have no published counterpart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from megatron_nepa.config import (
    AimObjective,
    DataConfig,
    JepaObjective,
    MaeObjective,
    ModelConfig,
    OptimizerConfig,
    PretrainingConfig,
    ProbeConfig,
)


def quickstart() -> PretrainingConfig:
    """A tiny trunk on the built-in photographs: minutes on two CPU cores; tensor-parallel sizes 2 and 4 divide it."""
    return PretrainingConfig(
        recipe="quickstart",
        model=ModelConfig(
            image_size=112,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            mlp_hidden_size=512,
            position_embedding="none",
            bos_token=True,
            layer_scale_init=0.1,
        ),
        data=DataConfig(horizontal_flip=True),
        # 1.2e-3 after scaling; 200 steps are too few for a 0.9999 average without its warm-up
        optimizer=OptimizerConfig(base_lr=4.8e-3, warmup_ratio=0.1, ema_warmup=True),
        output_dir="runs/quickstart",
        steps=200,
        global_batch_size=64,
        micro_batch_size=32,
        # CPUs without bf16 units multiply several times faster in fp32
        dtype="auto",
        save_every=100,
        log_every=1,
    )


def nepa_b() -> PretrainingConfig:
    """NEPA-B of the paper: SwiGLU of the width that matches the parameters of a 4x GELU (table 4: 1,600 epochs)."""
    return PretrainingConfig(
        recipe="nepa_b",
        model=ModelConfig(),
        output_dir="runs/nepa_b",
        epochs=1600,
        global_batch_size=4096,
        micro_batch_size=256,
    )


def nepa_l() -> PretrainingConfig:
    """NEPA-L of the paper (table 4: 800 epochs)."""
    return replace(
        nepa_b(),
        recipe="nepa_l",
        model=_trunk(num_layers=24, hidden_size=1024, num_heads=16, mlp_hidden_size=2752),
        output_dir="runs/nepa_l",
        # 40 of 800 epochs
        optimizer=OptimizerConfig(warmup_ratio=0.05),
        epochs=800,
        micro_batch_size=128,
    )


def nepa_b_release() -> PretrainingConfig:
    """NEPA-B as the authors' code trains it: GELU, BOS token, no learned positions, RoPE rescale, flip."""
    return _release(replace(nepa_b(), recipe="nepa_b_release", output_dir="runs/nepa_b_release"), 3072, "plain")


def nepa_l_release() -> PretrainingConfig:
    """NEPA-L as the authors' code trains it: as B, with affine QK-norm and 1,600 epochs."""
    base = replace(
        nepa_l(),
        recipe="nepa_l_release",
        output_dir="runs/nepa_l_release",
        optimizer=OptimizerConfig(),
        epochs=1600,
    )
    return _release(base, 4096, "affine")


def nepa_h() -> PretrainingConfig:
    """A 0.6-billion-parameter trunk of 32 blocks."""
    model = _trunk(num_layers=32, hidden_size=1280, num_heads=16, mlp_hidden_size=3456)
    return replace(nepa_l(), recipe="nepa_h", model=model, output_dir="runs/nepa_h", micro_batch_size=64)


def nepa_g() -> PretrainingConfig:
    """A 1.1-billion-parameter trunk of 40 blocks."""
    model = _trunk(num_layers=40, hidden_size=1536, num_heads=24, mlp_hidden_size=4096)
    return replace(nepa_l(), recipe="nepa_g", model=model, output_dir="runs/nepa_g", micro_batch_size=64)


def nepa_7b() -> PretrainingConfig:
    """A 6.7-billion-parameter trunk of 40 blocks, the one that tensor parallelism is for."""
    model = _trunk(num_layers=40, hidden_size=4096, num_heads=32, mlp_hidden_size=8192)
    return replace(nepa_l(), recipe="nepa_7b", model=model, output_dir="runs/nepa_7b", micro_batch_size=32)


def aim_b() -> PretrainingConfig:
    """NEPA-B's trunk and settings with AIM's objective, the pixels of the next patch, and its prefix attention."""
    return replace(nepa_b(), recipe="aim_b", objective=AimObjective(), output_dir="runs/aim_b")


def mae_b() -> PretrainingConfig:
    """MAE-B: a plain bidirectional ViT and MAE's settings (1,600 epochs), at the patch size of the other recipes."""
    return PretrainingConfig(
        recipe="mae_b",
        model=_plain_vit(num_layers=12, hidden_size=768, num_heads=12),
        objective=MaeObjective(),
        data=DataConfig(crop_scale_min=0.2, horizontal_flip=True),
        # 40 of 1,600 epochs of warm-up; MAE neither clips gradients nor averages weights
        optimizer=OptimizerConfig(base_lr=1.5e-4, clip_grad=0.0, ema_decay=0.0),
        probe=ProbeConfig(pooling="mean"),  # no token is the last where all see all
        output_dir="runs/mae_b",
        epochs=1600,
        global_batch_size=4096,
        micro_batch_size=256,
    )


def mae_l() -> PretrainingConfig:
    """MAE-L, the baseline of the paper's table 7, whose components are flags (--model.rope true and the like)."""
    model = _plain_vit(num_layers=24, hidden_size=1024, num_heads=16)
    return replace(mae_b(), recipe="mae_l", model=model, output_dir="runs/mae_l", micro_batch_size=128)


def jepa_b() -> PretrainingConfig:
    """JEPA-B: I-JEPA's ViT and settings (600 epochs, 40 of warm-up), at the patch size of the other recipes."""
    return PretrainingConfig(
        recipe="jepa_b",
        model=_jepa_vit(num_layers=12, hidden_size=768, num_heads=12),
        objective=JepaObjective(),
        data=DataConfig(crop_scale_min=0.3),
        # 1e-3 at a batch of 2,048 and 40 of 600 epochs of warm-up. I-JEPA starts at 2e-4, ends at 1e-6, and raises the
        # weight decay from 0.04 to 0.4: here it stays at their mean. It does not clip gradients.
        optimizer=OptimizerConfig(
            base_lr=1.25e-4,
            min_lr=1e-6,
            warmup_ratio=40 / 600,
            weight_decay=0.22,
            beta2=0.999,
            clip_grad=0.0,
            ema_decay=0.996,
        ),
        probe=ProbeConfig(pooling="mean"),
        output_dir="runs/jepa_b",
        epochs=600,
        global_batch_size=2048,
        micro_batch_size=128,
    )


def jepa_l() -> PretrainingConfig:
    """JEPA-L: as B, with a predictor of 12 blocks."""
    return replace(
        jepa_b(),
        recipe="jepa_l",
        model=_jepa_vit(num_layers=24, hidden_size=1024, num_heads=16),
        objective=JepaObjective(predictor_num_layers=12),
        output_dir="runs/jepa_l",
        micro_batch_size=64,
    )


def _jepa_vit(num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    return replace(_plain_vit(num_layers, hidden_size, num_heads), bos_token=False)  # I-JEPA's has no class token


def _plain_vit(num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    """A ViT as MAE trains it: GELU, class token, fixed positions; no RoPE, QK-norm or LayerScale."""
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        mlp="gelu",
        mlp_hidden_size=4 * hidden_size,
        qk_norm="none",
        rope=False,
        position_embedding="sincos",
        bos_token=True,
        layer_scale_init=None,
        causal=False,
        layer_norm_eps=1e-6,
    )


def _trunk(num_layers: int, hidden_size: int, num_heads: int, mlp_hidden_size: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads, mlp_hidden_size=mlp_hidden_size
    )


def _release(base: PretrainingConfig, mlp_hidden_size: int, qk_norm: Literal["plain", "affine"]) -> PretrainingConfig:
    model = replace(
        base.model,
        mlp="gelu",
        mlp_hidden_size=mlp_hidden_size,
        qk_norm=qk_norm,
        position_embedding="none",
        bos_token=True,
        rope_rescale=2.0,
        # the release draws once per forward call, which is once per micro-batch of a rank
        rope_rescale_group=base.micro_batch_size,
    )
    return replace(
        base,
        model=model,
        data=replace(base.data, horizontal_flip=True),
        optimizer=replace(base.optimizer, decay_bos_token=True),
    )


PRETRAINING_RECIPES: dict[str, Callable[[], PretrainingConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        nepa_b,
        nepa_l,
        nepa_b_release,
        nepa_l_release,
        nepa_h,
        nepa_g,
        nepa_7b,
        aim_b,
        mae_b,
        mae_l,
        jepa_b,
        jepa_l,
    )
}
