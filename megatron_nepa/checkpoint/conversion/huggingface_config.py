"""``config.json`` of a folder for Hugging Face transformers against :class:`ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_nepa.config import IMAGE_CHANNELS, ConfigError, ModelConfig, require

MODEL_TYPE = "nepa"
FORMAT_VERSION = 1
MODELING_FILE = "modeling_nepa.py"
# transformers writes only fields that differ from its class's defaults, which are ours
_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "mlp": "mlp",
    "intermediate_size": "mlp_hidden_size",
    "qk_norm": "qk_norm",
    "rope": "rope",
    "rope_theta": "rope_theta",
    "position_embedding": "position_embedding",
    "bos_token": "bos_token",
    "is_causal": "causal",
    "layer_norm_eps": "layer_norm_eps",
    "residual_dtype": "residual_dtype",
    "initializer_range": "init_std",
}
# settings of training alone, which the exported model keeps for the way back
_TRAINING = ("rope_rescale", "rope_rescale_group", "layer_scale_init", "drop_path", "freeze_patch_embedding")
_CLASSES = {
    "AutoConfig": "NepaConfig",
    "AutoModel": "NepaModel",
    "AutoModelForImageClassification": "NepaForImageClassification",
    "AutoModelForSemanticSegmentation": "NepaForSemanticSegmentation",
    "AutoBackbone": "NepaBackbone",
}


def model_to_huggingface(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """The values of config.json that describe a trunk.

    Args:
        model: the trunk.
        architecture: the class that the weights are of, such as "NepaModel".
    """
    module = MODELING_FILE.removesuffix(".py")
    return {
        "model_type": MODEL_TYPE,
        "architectures": [architecture],
        "auto_map": {auto: f"{module}.{name}" for auto, name in _CLASSES.items()},
        "format_version": FORMAT_VERSION,
        "num_channels": IMAGE_CHANNELS,
        **{theirs: getattr(model, ours) for theirs, ours in _FIELDS.items()},
        # fixed positions are weights as any other to who loads them
        "position_embedding": "none" if model.position_embedding == "none" else "learned",
        "layer_scale": model.layer_scale_init is not None,
        "training": {name: getattr(model, name) for name in _TRAINING},
        "dtype": "float32",
    }


def model_from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """The trunk that a config.json of such a folder describes.

    Raises:
        ConfigError: for a config of another model or a newer format, or a value that no model has.
    """
    kind = values.get("model_type")
    require(kind == MODEL_TYPE, f'config.json is of another model: "model_type" is {kind!r}, not {MODEL_TYPE!r}.')
    version = values.get("format_version", FORMAT_VERSION)
    require(
        isinstance(version, int) and version <= FORMAT_VERSION,
        f"config.json has format version {version}; this release reads up to version {FORMAT_VERSION}.",
    )
    channels = values.get("num_channels", IMAGE_CHANNELS)
    require(channels == IMAGE_CHANNELS, f"config.json has num_channels {channels}; this model serves {IMAGE_CHANNELS}.")
    training = {name: value for name, value in values.get("training", {}).items() if name in _TRAINING}
    default = ModelConfig().layer_scale_init
    scale = (training.get("layer_scale_init") or default) if values.get("layer_scale", True) else None
    ours = {name: values[theirs] for theirs, name in _FIELDS.items() if theirs in values}
    allowed = {field.name: field.type for field in fields(ModelConfig)}
    for name, value in ours.items():
        choices = str(allowed[name])
        require(
            not choices.startswith("Literal") or repr(value) in choices.replace('"', "'"),
            f"config.json has {value!r} for {name}, which is one of {choices.removeprefix('Literal')}.",
        )
    try:
        return ModelConfig(**ours, **{**training, "layer_scale_init": scale})
    except TypeError as error:  # a value of another type
        raise ConfigError(f"config.json describes no model: {error}.") from None
