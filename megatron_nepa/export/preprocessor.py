"""``preprocessor_config.json``: how images become a model's input, for transformers' image processors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_nepa.config import EvaluationConfig, ModelConfig

PREPROCESSOR_FILE = "preprocessor_config.json"
_BILINEAR, _BICUBIC = 2, 3  # PIL's numbers
_PIXELS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": _BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def evaluation_preprocessor(model: ModelConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """The pixels that a run's evaluation shows: a resize of the shorter side, or of both, and a centre crop.

    Args:
        model: of the run.
        run: its config as plain values; without a resize of its own the crop takes 7/8 of the shorter side.
    """
    side, squash = resize_of(model, run)
    size = {"height": side, "width": side} if squash else {"shortest_edge": side}
    return {
        "image_processor_type": "BitImageProcessor",
        **_PIXELS,
        "size": size,
        "do_center_crop": True,
        "crop_size": {"height": model.image_size, "width": model.image_size},
    }


def resize_of(model: ModelConfig, run: Mapping[str, Any]) -> tuple[int, bool]:
    """The side that a run's evaluation resizes images to before the crop, and whether both sides get that length.

    Args:
        model: of the run.
        run: its config as plain values.
    """
    evaluation = run.get("evaluation") or {}
    shown = EvaluationConfig(resize_size=evaluation.get("resize_size"), squash=bool(evaluation.get("squash")))
    return shown.shorter_side(model.image_size), shown.squash


def segmentation_preprocessor(model: ModelConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """One window for the whole image, squashed to its square; masks are resized alike, and their classes as trained.

    Args:
        model: of the run.
        run: its config as plain values.
    """
    return {
        "image_processor_type": "SegformerImageProcessor",
        **_PIXELS,
        "resample": _BILINEAR,
        "size": {"height": model.image_size, "width": model.image_size},
        "do_reduce_labels": bool((run.get("masks") or {}).get("reduce_zero_label")),
    }


def release_preprocessor(model: ModelConfig) -> dict[str, Any]:
    """What the release's scripts read: the model's image size, whose resize and crop they add themselves."""
    size = {"height": model.image_size, "width": model.image_size}
    return {"image_processor_type": "ViTImageProcessor", **_PIXELS, "size": size}
