"""NEPA's trunk as models of timm: ``import megatron_nepa.timm`` registers them.

The models are timm's own Eva, with two things that Eva lacks: attention that is causal in every call, and pooling of
the last token. All else is timm's: ``features_only``, ``forward_intermediates``, ``num_classes``, ``dynamic_img_size``,
``pretrained_cfg_overlay``.

    import timm, megatron_nepa.timm
    model = timm.create_model("local-dir:nepa_b_timm", pretrained=True)   # of convert_checkpoint.py to_timm
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from megatron_nepa.config import ConfigError, ModelConfig
from megatron_nepa.recipes.pretraining import (
    nepa_7b,
    nepa_b,
    nepa_b_release,
    nepa_g,
    nepa_h,
    nepa_l,
    nepa_l_release,
)

_OLDEST = (1, 0, 31)

if tuple(int(part) for part in timm.__version__.split(".")[:3] if part.isdigit()) < _OLDEST:
    raise ConfigError(
        f"megatron_nepa.timm needs timm {'.'.join(map(str, _OLDEST))} or newer, and {timm.__version__} is installed."
    )

_RECIPES = {
    "nepa_base_patch14_224": nepa_b,
    "nepa_large_patch14_224": nepa_l,
    "nepa_huge_patch14_224": nepa_h,
    "nepa_giant_patch14_224": nepa_g,
    "nepa_7b_patch14_224": nepa_7b,
    "nepa_base_release_patch14_224": nepa_b_release,
    "nepa_large_release_patch14_224": nepa_l_release,
}


class NepaVisionTransformer(Eva):
    """timm's Eva with causal attention and ``global_pool="last"``.

    Args:
        causal: whether a token attends to those before it alone, in every call that has no ``is_causal`` of its own.
        global_pool: as Eva's, or "last", the last token.
        norm_eps: epsilon of every LayerNorm.
        init_values: initial LayerScale; 0 is none (timm drops arguments that are None).
        use_fc_norm: LayerNorm after pooling.
        use_post_transformer_norm: LayerNorm after the blocks.
        **kwargs: of Eva.
    """

    def __init__(
        self,
        causal: bool = True,
        global_pool: str = "last",
        norm_eps: float = 1e-12,
        init_values: float | None = None,
        use_fc_norm: bool = False,
        use_post_transformer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            global_pool="" if global_pool == "last" else global_pool,
            norm_layer=partial(LayerNorm, eps=norm_eps),
            init_values=init_values or None,
            use_fc_norm=use_fc_norm,
            use_post_transformer_norm=use_post_transformer_norm,
            **kwargs,
        )
        self.causal = causal
        self.global_pool = global_pool

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
        """Images [B, C, H, W] to tokens [B, T, D] after the final LayerNorm.

        Args:
            x: images.
            attn_mask: of the attention, as Eva's.
            is_causal: overrides the model's.
        """
        tokens: Tensor = super().forward_features(x, attn_mask, self._is_causal(is_causal))
        return tokens

    def forward_intermediates(self, *args: Any, is_causal: bool | None = None, **kwargs: Any) -> Any:
        """As Eva's, causal as the model is.

        Args:
            *args: of Eva's.
            is_causal: overrides the model's.
            **kwargs: of Eva's.
        """
        return super().forward_intermediates(*args, **{**kwargs, "is_causal": self._is_causal(is_causal)})

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
        """Images [B, C, H, W] to logits, or to the pooled feature where ``num_classes`` is 0.

        Args:
            x: images.
            attn_mask: of the attention, as Eva's.
            is_causal: overrides the model's.
        """
        output: Tensor = self.forward_head(self.forward_features(x, attn_mask, is_causal))
        return output

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T, D] to one feature [B, D].

        Args:
            x: tokens.
            pool_type: instead of the model's.
        """
        if (pool_type or self.global_pool) == "last":
            return x[:, -1]
        pooled: Tensor = super().pool(x, pool_type)
        return pooled

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Draw a head of ``num_classes`` anew; 0 removes it.

        Args:
            num_classes: of the new head.
            global_pool: instead of the model's.
        """
        super().reset_classifier(num_classes, "" if global_pool == "last" else global_pool)
        if global_pool is not None:
            self.global_pool = global_pool

    def _is_causal(self, asked: bool | None) -> bool:
        return self.causal if asked is None else asked


def timm_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments of :class:`NepaVisionTransformer` for a trunk; DropPath and RoPE rescale are left to timm's user.

    Args:
        model: the trunk.
    """
    scale = model.layer_scale_init or 0
    return {"causal": model.causal, "norm_eps": model.layer_norm_eps, **eva_arguments(model), "init_values": scale}


def eva_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments of timm's own Eva for a trunk, but for causality and the epsilon of its LayerNorms.

    Args:
        model: the trunk.
    """
    width, hidden = model.hidden_size, model.mlp_hidden_size
    ratio = hidden / width
    arguments: dict[str, Any] = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": width,
        "depth": model.num_layers,
        "num_heads": model.num_heads,
        # timm cuts the product's fraction off
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "swiglu_mlp": model.mlp == "swiglu",
        "scale_mlp": False,
        "qkv_fused": True,
        "attn_type": "rope",
        "qk_norm": model.qk_norm != "none",
        "class_token": model.bos_token,
        "use_abs_pos_emb": model.position_embedding != "none",
        "use_rot_pos_emb": model.rope,
        "rope_type": "dinov3",
        "rope_temperature": model.rope_theta,
        "rope_rotate_half": True,
    }
    if model.layer_scale_init is not None:
        arguments["init_values"] = model.layer_scale_init
    return arguments


def _default_cfg(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_classes": 0,
        "input_size": (3, model.image_size, model.image_size),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({name: _default_cfg(recipe().model) for name, recipe in _RECIPES.items()})


def _entrypoint(name: str, arguments: dict[str, Any]) -> Callable[..., NepaVisionTransformer]:
    def build(pretrained: bool = False, **kwargs: Any) -> NepaVisionTransformer:
        out_indices = kwargs.pop("out_indices", 3)
        model: NepaVisionTransformer = build_model_with_cfg(
            NepaVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**arguments, **kwargs},
        )
        return model

    build.__name__ = build.__qualname__ = name
    return build


for _name, _recipe in _RECIPES.items():
    globals()[_name] = register_model(_entrypoint(_name, timm_arguments(_recipe().model)))
