"""The release's model, built from Hugging Face transformers.

The authors' trunk is transformers' DINOv3 ViT (the same RoPE, LayerScale and feed-forward layers) with causal attention
and QK-norm. With equal weights it computes this project's loss.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_nepa.config import ConfigError, ModelConfig, require


class PeerModel(nn.Module):
    """NEPA on transformers' DINOv3 ViT.

    Args:
        config: of a recipe that the release could train.

    Raises:
        ConfigError: without transformers, or for a model that the release does not have.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        try:
            from transformers import DINOv3ViTConfig, DINOv3ViTModel
        except ImportError as error:
            raise ConfigError(
                "--baseline compares with transformers: pip install 'megatron_nepa[benchmark]'."
            ) from error
        require(
            config.bos_token and config.rope and config.causal and config.position_embedding == "none",
            "--baseline trains the release's model, which has a BOS token, RoPE and no learned positions: "
            "take --recipe nepa_b_release, nepa_l_release or quickstart.",
        )
        require(
            config.layer_scale_init is not None and config.drop_path == 0,
            "--baseline trains the release's pre-training model, which has LayerScale and no DropPath.",
        )
        settings: dict[str, Any] = {
            "patch_size": config.patch_size,
            "image_size": config.image_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp_hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "hidden_act": "silu" if config.mlp == "swiglu" else "gelu",
            "use_gated_mlp": config.mlp == "swiglu",
            "key_bias": True,
            "layer_norm_eps": config.layer_norm_eps,
            "layerscale_value": config.layer_scale_init,
            "rope_theta": config.rope_theta,
            "pos_embed_rescale": config.rope_rescale,
            "initializer_range": config.init_std,
            "attn_implementation": "sdpa",
        }
        self.vit = DINOv3ViTModel(DINOv3ViTConfig(**settings))
        attentions: list[Any] = [module for module in self.vit.modules() if hasattr(module, "q_proj")]
        for attention in attentions:
            attention.is_causal = True
            if config.qk_norm != "none":
                attention.q_proj = nn.Sequential(attention.q_proj, HeadNorm(config))
                attention.k_proj = nn.Sequential(attention.k_proj, HeadNorm(config))
        self._embedding: Tensor | None = None
        self.vit.embeddings.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._embedding = output

    def forward(self, images: Tensor) -> Tensor:
        """Mean negative cosine of predicted and true next embeddings of images [B, 3, H, W]."""
        prediction = self.vit(images).last_hidden_state[:, :-1]
        assert self._embedding is not None
        target, self._embedding = self._embedding.detach()[:, 1:], None
        normalize = nn.functional.normalize
        return -(normalize(prediction, dim=-1) * normalize(target, dim=-1)).sum(-1).mean()


class HeadNorm(nn.LayerNorm):
    """LayerNorm of each head of a projection [B, T, heads * d]."""

    def __init__(self, config: ModelConfig) -> None:
        affine = config.qk_norm == "affine"
        super().__init__(config.head_size, eps=config.layer_norm_eps, elementwise_affine=affine, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, self.normalized_shape[0]))).flatten(-2)
