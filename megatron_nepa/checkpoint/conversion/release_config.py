"""The release's config.json against :class:`ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_nepa.config import IMAGE_CHANNELS, ConfigError, ModelConfig, require

_MODEL_TYPE = "vit_nepa"
# the release's class defaults: Hugging Face writes only fields that differ from them
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "use_gated_mlp": False,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "rope_theta": 100.0,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": IMAGE_CHANNELS,
    "qkv_bias": True,
    "qk_norm": False,
    "qk_norm_affine": False,
    "qk_norm_bias": False,
    "layerscale_value": 1e-5,
    "drop_path_prob": 0.0,
    "add_pooling_layer": False,
    "is_causal": True,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
    "pos_embed_rescale": 2.0,
}
# values of theirs that our model has no counterpart for
_FIXED: dict[str, Any] = {
    "num_channels": IMAGE_CHANNELS,
    "qkv_bias": True,
    "qk_norm_bias": False,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
}
_ACTIVATIONS = {(False, "gelu"): "gelu", (True, "silu"): "swiglu"}
# fields of ours that the release has in one value only, and why
_REQUIRED: dict[str, tuple[Any, str]] = {
    "position_embedding": ("none", "has no learned positions"),
    "bos_token": (True, "always prepends a token"),
    "rope": (True, "always rotates q and k"),
}


def model_from_release(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a released config.json describes.

    Raises:
        ConfigError: naming the field that our model has no counterpart for.
    """
    theirs = {**_DEFAULTS, **values}
    kind = theirs.get("model_type", _MODEL_TYPE)
    require(kind == _MODEL_TYPE, f'config.json is of another model: "model_type" is {kind!r}, not {_MODEL_TYPE!r}.')
    for name, value in _FIXED.items():
        require(theirs[name] == value, f'config.json has "{name}": {theirs[name]!r}; this model only serves {value!r}.')
    activation = (theirs["use_gated_mlp"], theirs["hidden_act"])
    require(
        activation in _ACTIVATIONS,
        f'config.json has "use_gated_mlp": {activation[0]} with "hidden_act": "{activation[1]}"; '
        "this model serves gelu without a gate and silu with one.",
    )
    return ModelConfig(
        image_size=theirs["image_size"],
        patch_size=theirs["patch_size"],
        hidden_size=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        mlp=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        mlp_hidden_size=theirs["intermediate_size"],
        qk_norm="none" if not theirs["qk_norm"] else "affine" if theirs["qk_norm_affine"] else "plain",
        rope_theta=theirs["rope_theta"],
        rope_rescale=theirs["pos_embed_rescale"],
        position_embedding="none",
        bos_token=True,
        layer_scale_init=theirs["layerscale_value"],
        drop_path=theirs["drop_path_prob"],
        causal=theirs["is_causal"],
        layer_norm_eps=theirs["layer_norm_eps"],
        init_std=theirs["initializer_range"],
    )


def model_to_release(
    model: ModelConfig, num_labels: int | None = None, pooled: bool = False, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json of a model, in the release's field names.

    Args:
        model: what is written.
        num_labels: classes of a classifier, or None for the pre-training model.
        pooled: whether the classifier averages the tokens and normalises the average (``fc_norm``).
        classes: their names, by number; those without one are called "LABEL_3" and so on.

    Raises:
        ConfigError: naming a choice of the model that the release's format cannot hold.
    """
    for name, (value, reason) in _REQUIRED.items():
        if getattr(model, name) != value:
            raise ConfigError(
                f"model.{name} is {getattr(model, name)}, but the released model {reason}: its format cannot hold this "
                "checkpoint; write one safetensors with consolidate instead."
            )
    gated, activation = next(key for key, value in _ACTIVATIONS.items() if value == model.mlp)
    values = {
        "model_type": _MODEL_TYPE,
        "architectures": ["ViTNepaForPreTraining" if num_labels is None else "ViTNepaForImageClassification"],
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": IMAGE_CHANNELS,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_hidden_size,
        "use_gated_mlp": gated,
        "hidden_act": activation,
        "qkv_bias": True,
        "qk_norm": model.qk_norm != "none",
        "qk_norm_affine": model.qk_norm == "affine",
        "qk_norm_bias": False,
        "layerscale_value": model.layer_scale_init,
        "drop_path_prob": model.drop_path,
        "is_causal": model.causal,
        "add_pooling_layer": pooled,
        "layer_norm_eps": model.layer_norm_eps,
        "initializer_range": model.init_std,
        "rope_theta": model.rope_theta,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": model.rope_rescale,
    }
    if num_labels is not None:
        values |= label_names(classes, num_labels)
    return values


def names_of_labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a config.json names, by number; the inverse of :func:`label_names`."""
    names = values.get("id2label") or {}
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def label_names(classes: Sequence[str], count: int) -> dict[str, dict[str, Any]]:
    """ "id2label" and "label2id" of a classifier, as transformers reads them.

    Args:
        classes: names by number.
        count: outputs of the classifier; those without a name are called "LABEL_3" and so on.
    """
    names = [classes[label] if label < len(classes) else f"LABEL_{label}" for label in range(count)]
    return {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }
