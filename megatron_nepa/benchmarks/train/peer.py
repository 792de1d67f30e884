"""The peer of the training benchmark: the release's model and training step, built from Hugging Face transformers.

The authors' trunk is transformers' DINOv3 ViT (the same RoPE, LayerScale and feed-forward layers) with causal attention
and QK-norm, trained by the HF Trainer: fp32 weights under bf16 autocast, torch's AdamW, clipping at 1.0, and an fp32
copy of the weights as their average. With equal weights it computes this project's loss.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nepa.benchmarks.train.steps import LEARNING_RATE, PartClock, Setting
from megatron_nepa.config import ConfigError, ModelConfig, require
from megatron_nepa.data.sampling.order import ORDER_VERSION
from megatron_nepa.tasks.pretraining import PretrainingTask


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


class PeerSteps:
    """The release's training step.

    Args:
        setting: the run; one rank.
    """

    def __init__(self, setting: Setting) -> None:
        run = setting.run
        require(setting.topology.world_size == 1, "--baseline compares on one device; start one process.")
        torch.manual_seed(run.seed)
        self.device = setting.topology.device
        self.accumulation_steps = run.accumulation_steps(1)
        self.autocast = run.dtype == "bf16"
        self.settings = run.optimizer
        self.model = PeerModel(run.model).to(self.device).train()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": run.optimizer.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(run.optimizer.beta1, run.optimizer.beta2),
            eps=run.optimizer.eps,
        )
        self.average: nn.Module | None = None
        self.loader = PretrainingTask(replace(run, dtype="fp32"), setting.topology).build_loader(
            0, Path(os.devnull), ORDER_VERSION
        )

    def step(self, clock: PartClock) -> None:
        """One optimizer step."""
        clock.start()
        for _ in range(self.accumulation_steps):
            images = next(self.loader).images
            clock.end("data")
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = self.model(images) / self.accumulation_steps
            clock.end("forward")
            loss.backward()
            clock.end("backward")
        if self.settings.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.settings.ema_decay > 0:
            self._update_average()
        clock.end("optimizer")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:  # the release copies the weights after the first step
            self.average = copy.deepcopy(self.model)
            return
        decay, weights = self.settings.ema_decay, self.model.state_dict()
        for name, average in self.average.state_dict().items():
            average.mul_(decay).add_(weights[name], alpha=1 - decay)
