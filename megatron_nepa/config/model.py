"""The model: a causal Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_nepa.config.checks import divisors, multiples_around, one_of, require, require_finite

# every image is RGB: the decoder converts grey and CMYK ones
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class ModelConfig:
    """The causal Vision Transformer (paper section 3.2; the release where they differ)."""

    # side of the square input image, pixels
    image_size: int = 224
    # side of a square patch, pixels
    patch_size: int = 14
    # width D of the residual stream
    hidden_size: int = 768
    # number of transformer blocks
    num_layers: int = 12
    # attention heads; the head width is hidden_size / num_heads
    num_heads: int = 12
    # feed-forward kind: swiglu (paper) or gelu (release)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    # feed-forward width F
    mlp_hidden_size: int = 2048
    # LayerNorm on each head's q and k: none, plain (no parameters, paper) or affine (a weight per channel)
    qk_norm: Literal["none", "plain", "affine"] = "plain"
    # 2-D rotary position embedding on q and k
    rope: bool = True
    # base of the rotary frequencies
    rope_theta: float = 100.0
    # training-time RoPE augmentation: coordinates times exp(U(-ln r, ln r)); none switches it off (release: 2.0)
    rope_rescale: float | None = None
    # consecutive samples of the run that share one RoPE-rescale draw (release: one per forward call)
    rope_rescale_group: int = 1
    # positions added to the trunk's input, never to the target: learned (paper), none (release), or fixed sines and
    # cosines (sincos, MAE)
    position_embedding: Literal["none", "learned", "sincos"] = "learned"
    # prepend one learned token that is never a target (release)
    bos_token: bool = False
    # initial value of the per-channel branch scale; none removes LayerScale
    layer_scale_init: float | None = 1e-5
    # DropPath rate of the last block; earlier blocks grow linearly from 0
    drop_path: float = 0.0
    # causal attention (pre-training) or bidirectional
    causal: bool = True
    # epsilon of every LayerNorm, added in fp32
    layer_norm_eps: float = 1e-12
    # standard deviation of the initial weights
    init_std: float = 0.02
    # dtype of the residual stream; bf16 rounds away a branch scaled by 1e-5
    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    # keep the patch embedding at its initial value
    freeze_patch_embedding: bool = False

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid_size**2

    @property
    def sequence_length(self) -> int:
        """Tokens T of one image: its patches, and the BOS token where there is one."""
        return self.num_patches + int(self.bos_token)

    def __post_init__(self) -> None:
        require_finite(self, "model.")
        for name in ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        require(self.mlp_hidden_size >= 1, f"model.mlp_hidden_size is {self.mlp_hidden_size}; it must be at least 1.")
        require(
            self.image_size % self.patch_size == 0,
            f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}: take "
            f"model.image_size {one_of(multiples_around(self.image_size, self.patch_size, least=2))}.",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}: "
            f"{self._possible_heads()}.",
        )
        require(
            not self.rope or self.head_size % 4 == 0,
            f"2-D RoPE needs a head width divisible by 4, but model.hidden_size {self.hidden_size} / model.num_heads "
            f"{self.num_heads} = {self.head_size}: {self._possible_heads()}.",
        )
        require(
            self.position_embedding != "sincos" or self.hidden_size % 4 == 0,
            f"position_embedding sincos needs a model.hidden_size divisible by 4, and it is {self.hidden_size}: take "
            f"{one_of(multiples_around(self.hidden_size, 4))}.",
        )
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; it must be positive.")
        require(self.init_std > 0, f"model.init_std is {self.init_std}; it must be positive.")
        require(self.layer_norm_eps >= 0, f"model.layer_norm_eps is {self.layer_norm_eps}; it must not be negative.")
        require(0.0 <= self.drop_path < 1.0, f"model.drop_path is {self.drop_path}; it must lie in [0, 1).")
        require(
            self.rope_rescale is None or self.rope_rescale >= 1.0,
            f"model.rope_rescale is {self.rope_rescale}; it must be none or at least 1.",
        )
        require(
            self.rope_rescale_group >= 1,
            f"model.rope_rescale_group is {self.rope_rescale_group}; it must be at least 1.",
        )
        require(self.num_patches >= 2, "the image must hold at least two patches: there is no next patch to predict.")

    def _possible_heads(self) -> str:
        """Numbers of heads near the one asked for that the width allows, or else a width that allows it."""
        unit = 4 if self.rope else 1  # of the head's width
        heads = [count for count in divisors(self.hidden_size) if self.hidden_size // count % unit == 0]
        if not heads:
            width = one_of(multiples_around(self.hidden_size, self.num_heads * unit))
            return f"take model.hidden_size {width}"
        nearest = sorted(heads, key=lambda count: abs(count - self.num_heads))[:3]
        return f"take model.num_heads {one_of(sorted(nearest))}"
