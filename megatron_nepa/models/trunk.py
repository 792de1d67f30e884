"""The trunk that every task shares: patch embedding, blocks, final norm.

Shapes: B samples of the micro-batch, b of them whose images this rank holds, C channels, T tokens of a sample, N = B T
token rows of the replica, n of them on this rank, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_nepa.config import ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.draws import drop_path_factors, patch_mask, rope_rescale_factor
from megatron_nepa.models.patch_embedding import PatchEmbedding, token_index
from megatron_nepa.models.rope import rope_angles
from megatron_nepa.models.stack import run_blocks
from megatron_nepa.models.transformer import Block, Norm
from megatron_nepa.parallel.rows import RowShard, shard_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stream_dtype(config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the residual stream of blocks that start from rows of ``dtype``: never a narrower one."""
    return torch.promote_types(DTYPES[config.residual_dtype], dtype)


class TrunkOutput(NamedTuple):
    """What the trunk computes from a micro-batch, as this rank's token rows.

    Attributes:
        embedding: input embedding z, [n, D], or [n + 1, D] with the halo row where the rows cut a sample.
        output: the final norm's output, [n, D].
        rows: which of the replica's rows these are.
        period: tokens T of a sample.
        taps: the residual stream after each of the blocks that were asked for, [n, D], without a norm.
    """

    embedding: Tensor
    output: Tensor
    rows: RowShard
    period: int
    taps: tuple[Tensor, ...] = ()


class Trunk(nn.Module):
    """Causal Vision Transformer.

    Args:
        config: the model's shape.
        build: ranks, kernels and seed.
        mask_ratio: share of input patches that the mask token replaces in training.
    """

    def __init__(self, config: ModelConfig, build: Build = Build(), mask_ratio: float = 0.0) -> None:
        super().__init__()
        build.parallel.check_model(config)
        self.config = config
        self.mask_ratio = mask_ratio
        self.seed = build.seed
        self.tensor = build.tensor
        self.kernels = build.kernels
        self.sequence_parallel = build.parallel.sequence_parallel
        self.activation_checkpointing = build.parallel.activation_checkpointing
        self.embedding = PatchEmbedding(config, build, masking=mask_ratio > 0)
        self.blocks = nn.ModuleList(Block(config, build) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size)

    def forward(
        self,
        images: Tensor,
        sample_index: Tensor,
        taps: Sequence[int] = (),
        kept: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> TrunkOutput:
        """Embed and transform a micro-batch.

        Args:
            images: [b, C, H, W]: the whole micro-batch, or this tensor-parallel rank's equal share of it.
            sample_index: sample numbers of the whole micro-batch, int64 [B].
            taps: blocks, counted from 0, whose streams are returned as well.
            kept: the patches of every sample that enter, numbers from 0 in raster order, int64 [B, K]: T is then K and
                the BOS token. None takes all.
            visible: which tokens (fourth axis) every token (third) attends to, bool [B, 1, T, T]; None is as
                ``config.causal`` says.
        """
        config, num_samples = self.config, sample_index.shape[0]
        grid = (images.shape[2] // config.patch_size, images.shape[3] // config.patch_size)
        num_prefix = int(config.bos_token)
        period = (grid[0] * grid[1] if kept is None else kept.shape[1]) + num_prefix
        rows = shard_rows(num_samples * period, self.tensor, self.sequence_parallel)

        mask = None
        if self.training and self.mask_ratio > 0:
            mask = patch_mask(self.mask_ratio, period - num_prefix, self.seed, sample_index)  # [B, patches]
        dtype = stream_dtype(config, images.dtype)
        embedding, stream = self.embedding(images, num_samples, rows, mask, dtype, kept)  # [n or n + 1, D], [n, D]

        angles, rope_scale = None, None
        if config.rope:
            angles = rope_angles(*grid, config.head_size, config.rope_theta, num_prefix, images.device)
            if kept is not None:
                angles = angles[token_index(kept, num_prefix)]  # [B, T, d / 2]
            if self.training and config.rope_rescale is not None:
                rope_scale = rope_rescale_factor(
                    config.rope_rescale, config.rope_rescale_group, self.seed, sample_index
                )
        normed, tapped = run_blocks(
            self.blocks,
            self.norm,
            stream,
            angles=angles,
            num_samples=num_samples,
            period=period,
            rope_scale=rope_scale,
            row_scale=self._row_scale(sample_index, rows, period),
            visible=visible,
            recompute=self.activation_checkpointing == "full",
            taps=taps,
        )
        return TrunkOutput(embedding, normed, rows, period, tapped)

    def _row_scale(self, sample_index: Tensor, rows: RowShard, period: int) -> Tensor | None:
        if not self.training or self.config.drop_path == 0:
            return None
        factors = drop_path_factors(self.config.drop_path, self.config.num_layers, self.seed, sample_index)
        sample = rows.sample_of_row(period, sample_index.shape[0], sample_index.device)
        return factors[:, sample]  # [2 L, n]
