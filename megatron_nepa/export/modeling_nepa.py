"""NEPA (next-embedding predictive autoregression) vision models for Hugging Face transformers.

This file needs torch and transformers alone. It lies in a model's folder beside its weights, and
``trust_remote_code=True`` lets transformers run it from there. It computes what the training code evaluates; DropPath,
RoPE rescaling and other draws of that training are not part of it.

Copyright 2026 the authors of megatron_nepa. Licence: Apache-2.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # where transformers 5.0 has them
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

FORMAT_VERSION = 1


class NepaConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """Shape of a NEPA vision transformer; the defaults are NEPA-B of the paper.

    Args:
        image_size: side of the square images that it was trained on, pixels.
        patch_size: side of a patch, pixels.
        num_channels: of an image.
        hidden_size: width D of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each.
        mlp: "swiglu" or "gelu".
        intermediate_size: width of the feed-forward layers.
        qk_norm: LayerNorm of each head's queries and keys: "none", "plain" (no parameters) or "affine" (a weight).
        rope: whether queries and keys are rotated by their patch's place.
        rope_theta: base of the rotary frequencies.
        position_embedding: "learned", added to the patches, or "none".
        bos_token: whether a learned token stands before the patches.
        use_mask_token: whether there is a learned token that may stand in for patches (``bool_masked_pos``).
        layer_scale: whether the branches are scaled by a learned factor for each channel.
        is_causal: whether a token attends to those before it alone.
        layer_norm_eps: epsilon of every LayerNorm.
        residual_dtype: least precision of the residual stream: "fp32" or "bf16".
        initializer_range: standard deviation of new weights.
        pooling: what stands for an image: "last", the last token's output, or "mean", the mean of the patches'.
        apply_layernorm: whether a backbone's feature maps pass the final LayerNorm.
        out_features: a backbone's stages: "stem", "stage1" to "stage12", each after so many blocks.
        out_indices: the same by number; default the last.
        format_version: of the folder.
        training: settings of the training code that change nothing here, kept for the way back.
        **kwargs: of ``PreTrainedConfig``.

    Raises:
        ValueError: for a folder of a newer format, or stages that contradict each other.
    """

    model_type = "nepa"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp: str = "swiglu",
        intermediate_size: int = 2048,
        qk_norm: str = "plain",
        rope: bool = True,
        rope_theta: float = 100.0,
        position_embedding: str = "learned",
        bos_token: bool = False,
        use_mask_token: bool = False,
        layer_scale: bool = True,
        is_causal: bool = True,
        layer_norm_eps: float = 1e-12,
        residual_dtype: str = "fp32",
        initializer_range: float = 0.02,
        pooling: str = "last",
        apply_layernorm: bool = False,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        format_version: int = FORMAT_VERSION,
        training: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this folder has format version {format_version}, and this modeling_nepa.py reads up to "
                f"{FORMAT_VERSION}: take the file that came with the folder."
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp = mlp
        self.intermediate_size = intermediate_size
        self.qk_norm = qk_norm
        self.rope = rope
        self.rope_theta = rope_theta
        self.position_embedding = position_embedding
        self.bos_token = bos_token
        self.use_mask_token = use_mask_token
        self.layer_scale = layer_scale
        self.is_causal = is_causal
        self.layer_norm_eps = layer_norm_eps
        self.residual_dtype = residual_dtype
        self.initializer_range = initializer_range
        self.pooling = pooling
        self.apply_layernorm = apply_layernorm
        self.format_version = format_version
        self.training = training or {}
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, num_hidden_layers + 1))]
        self._out_features = self._out_indices = None
        if out_features is not None:
            self.out_features = list(out_features)
            if out_indices is not None and [i % len(self.stage_names) for i in out_indices] != self.out_indices:
                raise ValueError(f"out_features {out_features} and out_indices {out_indices} are not the same stages.")
        else:
            self.out_indices = list(out_indices) if out_indices is not None else [num_hidden_layers]


@dataclass
class NepaModelOutput(BaseModelOutputWithPooling):
    """What :class:`NepaModel` computes.

    Attributes:
        last_hidden_state: after the final LayerNorm, [B, T, D]: the BOS token where there is one, then the patches.
        pooler_output: the last token's output or the mean of the patches' (``config.pooling``), [B, D].
        hidden_states: the residual stream before the first and after every block, without a LayerNorm, each [B, T, D].
        attentions: of every block, [B, heads, T, T] (``attn_implementation="eager"``).
        patch_embeddings: what the token before each predicts in training, [B, T, D]: the patches' linear embeddings.
    """

    patch_embeddings: Tensor | None = None


class NepaLayerNorm(nn.LayerNorm):
    """LayerNorm whose statistics and affine are fp32 or wider, and whose result has its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        bias = None if self.bias is None else self.bias.to(wide)
        normed = nn.functional.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)
        return normed if self.weight is None else normed.to(self.weight.dtype)


def rope_angles(height: int, width: int, head_size: int, theta: float, device: torch.device) -> Tensor:
    """Rotation angles of ``height`` x ``width`` patches in raster order, fp32 [patches, head_size / 2].

    Patch centres are normalised to (-1, 1) of the image, so that any size is served; the first half of the angles turns
    with y, the second with x.
    """
    frequency = theta ** -(torch.arange(head_size // 4, dtype=torch.float32, device=device) * 4 / head_size)
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width * 2 - 1
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2, 1)
    return (2 * math.pi * centres * frequency).flatten(1)


class NepaEmbeddings(nn.Module):
    """Images to tokens."""

    def __init__(self, config: NepaConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        grid = config.image_size // patch
        self.projection = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.bos_token else None
        learned = config.position_embedding == "learned"
        self.positions = nn.Parameter(torch.zeros(1, grid**2 + int(config.bos_token), width)) if learned else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_mask_token else None

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None, interpolate_pos_encoding: bool
    ) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] to the patches' embeddings with the BOS token and the trunk's input, both [B, T, D]."""
        config, patch = self.config, self.config.patch_size
        batch, _, height, width = pixel_values.shape
        if height % patch or width % patch:
            raise ValueError(f"an image of {height} x {width} pixels is no whole number of {patch} x {patch} patches.")
        embedded = self.projection(pixel_values).flatten(2).transpose(1, 2)
        tokens = embedded
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos is given, but the model was trained without a mask token.")
            tokens = torch.where(bool_masked_pos.flatten(1)[..., None], self.mask_token, tokens)
        if self.cls_token is not None:
            first = self.cls_token.expand(batch, -1, -1)
            embedded, tokens = torch.cat((first, embedded), dim=1), torch.cat((first, tokens), dim=1)
        least = torch.float32 if config.residual_dtype == "fp32" else torch.bfloat16
        stream = tokens.to(torch.promote_types(least, tokens.dtype))
        if self.positions is None:
            return embedded, stream
        positions = self.positions.to(stream.dtype)
        if positions.shape[1] != stream.shape[1]:
            if not interpolate_pos_encoding:
                raise ValueError(
                    f"the learned positions are for images of {config.image_size} x {config.image_size} pixels, not "
                    f"{height} x {width}: give interpolate_pos_encoding=True to resample them."
                )
            positions = self._resampled(positions, height // patch, width // patch)
        return embedded, stream + positions

    def _resampled(self, positions: Tensor, height: int, width: int) -> Tensor:
        prefix, grid = int(self.config.bos_token), self.config.image_size // self.config.patch_size
        of_patches = positions[:, prefix:].transpose(1, 2).unflatten(2, (grid, grid))
        resized = nn.functional.interpolate(of_patches, (height, width), mode="bicubic", align_corners=False)
        return torch.cat((positions[:, :prefix], resized.flatten(2).transpose(1, 2)), dim=1)


class NepaAttention(nn.Module):
    """QK-norm, rotation, attention."""

    def __init__(self, config: NepaConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = config.is_causal
        width = config.hidden_size
        self.head_size = width // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = self._new_norm(), self._new_norm()

    def _new_norm(self) -> nn.Module:
        kind, eps = self.config.qk_norm, self.config.layer_norm_eps
        if kind == "none":
            return nn.Identity()
        return NepaLayerNorm(self.head_size, eps, elementwise_affine=kind == "affine", bias=False)

    def forward(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to the same, and the attention [B, heads, T, T] where the implementation gives it."""
        shape = (*x.shape[:2], -1, self.head_size)
        query, key, value = (proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        wide = torch.promote_types(value.dtype, torch.float32)
        query, key = self.q_norm(query.to(wide)).to(wide), self.k_norm(key.to(wide)).to(wide)
        if angles is not None:
            query, key = _rotated(query, angles), _rotated(key, angles)
        query, key = query.to(value.dtype), key.to(value.dtype)
        name = self.config._attn_implementation
        attend = _eager_attention if name in ("eager", None) else ALL_ATTENTION_FUNCTIONS[name]
        mixed, weights = attend(
            self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=self.is_causal
        )
        return self.o_proj(mixed.flatten(2)), weights


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


class NepaMLP(nn.Module):
    """SwiGLU or GELU feed-forward layer."""

    def __init__(self, config: NepaConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(nn.functional.gelu(up))
        gate = self.gate_proj(x)
        wide = torch.promote_types(gate.dtype, torch.float32)
        return self.down_proj((nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype))


class NepaBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and feed-forward branches on the residual stream."""

    def __init__(self, config: NepaConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = NepaLayerNorm(width, eps)
        self.attention = NepaAttention(config)
        self.layer_scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.norm2 = NepaLayerNorm(width, eps)
        self.mlp = NepaMLP(config)
        self.layer_scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, stream: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to the same, and the attention or None."""
        branch, weights = self.attention(self.norm1(stream), angles)
        stream = stream + _scaled(branch, self.layer_scale1, stream.dtype)
        return stream + _scaled(self.mlp(self.norm2(stream)), self.layer_scale2, stream.dtype), weights


def _scaled(branch: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return branch.to(dtype) if scale is None else branch.to(dtype) * scale.to(dtype)


class NepaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all NEPA models share: how weights are drawn and which attention serves them."""

    config: NepaConfig
    config_class = NepaConfig
    base_model_prefix = "nepa"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["NepaEmbeddings", "NepaBlock"]  # noqa: RUF012
    # of a classifier or segmenter, whose trunk is taken without its head
    _keys_to_ignore_on_load_unexpected = [r"^fc_norm\.", r"^classifier\.", r"^decoder\."]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, NepaEmbeddings):
            for token in (module.cls_token, module.positions, module.mask_token):
                if token is not None:
                    nn.init.normal_(token, std=std)
        elif isinstance(module, NepaBatchNorm):
            for ones, zeros in ((module.weight, module.bias), (module.running_var, module.running_mean)):
                nn.init.ones_(ones)
                nn.init.zeros_(zeros)
        elif isinstance(module, NepaConv | NepaUpsample | NepaPixelClassifier):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, NepaBlock):
            initial = self.config.training.get("layer_scale_init") or 1e-5
            for scale in (module.layer_scale1, module.layer_scale2):
                if scale is not None:
                    nn.init.constant_(scale, initial)


class NepaModel(NepaPreTrainedModel):
    """The trunk: patches to features.

    Args:
        config: its shape.
    """

    def __init__(self, config: NepaConfig) -> None:
        super().__init__(config)
        self.embeddings = NepaEmbeddings(config)
        self.layers = nn.ModuleList(NepaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = NepaLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.projection

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NepaModelOutput | tuple[Any, ...]:
        """Features of a batch.

        Args:
            pixel_values: [B, C, H, W] with sides that are multiples of the patch's.
            bool_masked_pos: patches that the mask token replaces, [B, patches].
            interpolate_pos_encoding: resample learned positions to images of another size.
            output_attentions: return the attention of every block.
            output_hidden_states: return the stream of every block.
            return_dict: False returns a plain tuple.
            **kwargs: ignored.
        """
        config = self.config
        embedded, stream = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        prefix = int(config.bos_token)
        angles = None
        if config.rope:
            height, width = (side // config.patch_size for side in pixel_values.shape[2:])
            head_size = config.hidden_size // config.num_attention_heads
            angles = rope_angles(height, width, head_size, config.rope_theta, stream.device)
            angles = nn.functional.pad(angles, (0, 0, prefix, 0))
        streams, attentions = [stream], []
        for layer in self.layers:
            stream, weights = layer(stream, angles)
            streams.append(stream)
            attentions.append(weights)
        normed = self.norm(stream)
        pooled = normed[:, -1]
        if config.pooling == "mean":
            pooled = normed[:, prefix:].mean(dim=1, dtype=torch.promote_types(normed.dtype, torch.float32))
        wants_streams = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        output = NepaModelOutput(
            last_hidden_state=normed,
            pooler_output=pooled,
            hidden_states=tuple(streams) if wants_streams else None,
            attentions=tuple(attentions) if wants_attentions else None,
            patch_embeddings=embedded,
        )
        return output if _as_dict(config, return_dict) else output.to_tuple()


class NepaForImageClassification(NepaPreTrainedModel):
    """The trunk and a linear layer; mean pooling has a LayerNorm of its own before it.

    Args:
        config: its shape; ``num_labels`` classes.
    """

    def __init__(self, config: NepaConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.nepa = NepaModel(config)
        self.fc_norm = NepaLayerNorm(config.hidden_size, config.layer_norm_eps) if config.pooling == "mean" else None
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits [B, classes], and the loss where labels are given; the other arguments are :class:`NepaModel`'s.

        Args:
            pixel_values: [B, C, H, W].
            labels: class numbers [B].
            interpolate_pos_encoding: see there.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            **kwargs: of the loss.
        """
        found = self.nepa(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = found.pooler_output
        if self.fc_norm is not None:
            pooled = self.fc_norm(pooled)
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        loss = self.loss_function(labels, logits, self.config, **kwargs) if labels is not None else None
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class NepaBatchNorm(nn.Module):
    """BatchNorm of channels, without torch's count of batches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        statistics = (self.running_mean, self.running_var)
        return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, 1e-5)


class NepaConv(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, channels, kernel_size, kernel_size))
        self.bias = None
        self.norm = NepaBatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, out, h, w]."""
        return nn.functional.relu(self.norm(nn.functional.conv2d(x, self.weight, padding="same")))


class NepaUpsample(nn.Module):
    """Transposed convolution that doubles both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels, 2, 2))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, 2h, 2w]."""
        return nn.functional.conv_transpose2d(x, self.weight, self.bias, stride=2)


class NepaPixelClassifier(nn.Module):
    """Class scores of every pixel; training drops a tenth of the channels."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, classes, h, w]."""
        return nn.functional.conv2d(nn.functional.dropout2d(x, 0.1, self.training), self.weight, self.bias)


class NepaPyramid(nn.Module):
    """Four maps of one size to four times, twice, once and half of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.upsample1 = NepaUpsample(width)
        self.norm = NepaBatchNorm(width)
        self.upsample2 = NepaUpsample(width)
        self.upsample = NepaUpsample(width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, D, h, w] to the levels, finest first."""
        first, second, third, fourth = maps
        finest = self.upsample2(nn.functional.gelu(self.norm(self.upsample1(first))))
        return [finest, self.upsample(second), third, nn.functional.max_pool2d(fourth, 2)]


class NepaUperHead(nn.Module):
    """UPerNet's head (Xiao et al. 2018)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.scales = (1, 2, 3, 6)
        self.pooled = nn.ModuleList(NepaConv(width, width, 1) for _ in self.scales)
        self.bottleneck = NepaConv(5 * width, width, 3)
        self.lateral = nn.ModuleList(NepaConv(width, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(NepaConv(width, width, 3) for _ in range(3))
        self.fusion = NepaConv(4 * width, width, 3)
        self.classifier = NepaPixelClassifier(width, classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B, D, h_i, w_i], finest first, to [B, classes, h_0, w_0]."""
        coarsest = levels[-1]
        cells = (nn.functional.adaptive_avg_pool2d(coarsest, scale) for scale in self.scales)
        pooled = [_resized(conv(x), coarsest.shape[2:]) for conv, x in zip(self.pooled, cells, strict=True)]
        paths = [lateral(level) for lateral, level in zip(self.lateral, levels[:-1], strict=True)]
        paths.append(self.bottleneck(torch.cat((coarsest, *pooled), dim=1)))
        for i in (3, 2, 1):
            paths[i - 1] = paths[i - 1] + _resized(paths[i], paths[i - 1].shape[2:])
        smoothed = [smooth(path) for smooth, path in zip(self.smooth, paths[:-1], strict=True)]
        size = smoothed[0].shape[2:]
        joined = [smoothed[0], *(_resized(x, size) for x in (*smoothed[1:], paths[-1]))]
        return self.classifier(self.fusion(torch.cat(joined, dim=1)))


class NepaFcnHead(nn.Module):
    """One convolution and a classifier, whose loss helps the trunk to train."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv = NepaConv(width, 256, 3)
        self.classifier = NepaPixelClassifier(256, classes)

    def forward(self, level: Tensor) -> Tensor:
        """[B, D, h, w] to [B, classes, h, w]."""
        return self.classifier(self.conv(level))


class NepaDecoder(nn.Module):
    """All that segmentation adds to the trunk."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.neck = NepaPyramid(width)
        self.head = NepaUperHead(width, classes)
        self.auxiliary = NepaFcnHead(width, classes)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Four maps [B, D, h, w] to the logits of both heads."""
        levels = self.neck(maps)
        return self.head(levels), self.auxiliary(levels[2])


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class NepaForSemanticSegmentation(NepaPreTrainedModel):
    """The trunk and UPerNet; the heads read the streams after 1/3, 1/2, 2/3 and all of the blocks.

    Args:
        config: its shape; ``num_labels`` classes.
    """

    def __init__(self, config: NepaConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.nepa = NepaModel(config)
        self.decoder = NepaDecoder(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Logits [B, classes, H, W], and the loss where labels are given; the other arguments are :class:`NepaModel`'s.

        Args:
            pixel_values: [B, C, H, W], sides of two patches or more.
            labels: class numbers [B, H, W], 255 where a pixel counts for nothing.
            interpolate_pos_encoding: see there.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            **kwargs: ignored.
        """
        config = self.config
        found = self.nepa(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=True,
            return_dict=True,
        )
        depth = config.num_hidden_layers
        stages = [max(round(depth * share), 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        grid = [side // config.patch_size for side in pixel_values.shape[2:]]
        patches = [found.hidden_states[stage][:, int(config.bos_token) :].unflatten(1, grid) for stage in stages]
        logits, auxiliary = self.decoder([x.permute(0, 3, 1, 2).to(pixel_values.dtype) for x in patches])
        logits, auxiliary = (_resized(x, pixel_values.shape[2:]) for x in (logits, auxiliary))
        loss = None
        if labels is not None:
            losses = [
                nn.functional.cross_entropy(x.float(), labels, ignore_index=255, reduction="sum") / labels.numel()
                for x in (logits, auxiliary)
            ]
            loss = losses[0] + 0.4 * losses[1]
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states if wanted else None,
            attentions=found.attentions,
        )
        return output if _as_dict(config, return_dict) else output.to_tuple()


class NepaBackbone(BackboneMixin, NepaPreTrainedModel):  # type: ignore[misc]
    """The trunk as a backbone: feature maps [B, D, H / patch, W / patch] of the stages of ``config.out_features``.

    Args:
        config: its shape and stages.
    """

    def __init__(self, config: NepaConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 5.0
            self._init_backbone(config)  # type: ignore[operator]
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.nepa = NepaModel(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Feature maps of a batch; the arguments are :class:`NepaModel`'s.

        Args:
            pixel_values: [B, C, H, W].
            output_hidden_states: see there.
            output_attentions: see there.
            return_dict: see there.
            interpolate_pos_encoding: see there.
            **kwargs: ignored.
        """
        config = self.config
        found = self.nepa(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=True,
            return_dict=True,
        )
        grid = [side // config.patch_size for side in pixel_values.shape[2:]]
        maps = []
        for stage, stream in zip(self.stage_names, found.hidden_states, strict=True):
            if stage in self.out_features:
                x = self.nepa.norm(stream) if config.apply_layernorm else stream
                x = x[:, int(config.bos_token) :].unflatten(1, grid)
                maps.append(x.permute(0, 3, 1, 2).to(pixel_values.dtype).contiguous())
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BackboneOutput(
            feature_maps=tuple(maps),
            hidden_states=found.hidden_states if wanted else None,
            attentions=found.attentions,
        )
        return output if _as_dict(config, return_dict) else output.to_tuple()


def _as_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
