"""The trunk that every task shares: patch embedding, blocks, final norm.

Shapes: B samples of the micro-batch, b of them whose images this rank holds, C channels, T tokens of a sample, N = B T
token rows of the replica, n of them on this rank, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron_nepa.config import ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.draws import drop_path_factors, patch_mask, rope_rescale_factor
from megatron_nepa.models.patch_embedding import PatchEmbedding
from megatron_nepa.models.recomputation import recomputed
from megatron_nepa.models.rope import rope_angles
from megatron_nepa.models.transformer import Block, Norm
from megatron_nepa.parallel.parameters import sum_split_gradients
from megatron_nepa.parallel.rows import RowShard, shard_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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

    def forward(self, images: Tensor, sample_index: Tensor, taps: Sequence[int] = ()) -> TrunkOutput:
        """Embed and transform a micro-batch.

        Args:
            images: [b, C, H, W]: the whole micro-batch, or this tensor-parallel rank's equal share of it.
            sample_index: sample numbers of the whole micro-batch, int64 [B].
            taps: blocks, counted from 0, whose streams are returned as well.
        """
        config, num_samples = self.config, sample_index.shape[0]
        grid = (images.shape[2] // config.patch_size, images.shape[3] // config.patch_size)
        num_prefix = int(config.bos_token)
        period = grid[0] * grid[1] + num_prefix
        rows = shard_rows(num_samples * period, self.tensor, self.sequence_parallel)

        mask = None
        if self.training and self.mask_ratio > 0:
            mask = patch_mask(self.mask_ratio, period - num_prefix, self.seed, sample_index)  # [B, patches]
        stream_dtype = torch.promote_types(DTYPES[config.residual_dtype], images.dtype)
        embedding, stream = self.embedding(images, num_samples, rows, mask, stream_dtype)  # [n or n + 1, D], [n, D]

        angles, rope_scale = None, None
        if config.rope:
            angles = rope_angles(*grid, config.head_size, config.rope_theta, num_prefix, images.device)
            if self.training and config.rope_rescale is not None:
                rope_scale = rope_rescale_factor(
                    config.rope_rescale, config.rope_rescale_group, self.seed, sample_index
                )
        row_scale = self._row_scale(sample_index, rows, period)  # 2 L of [n]

        blocks = cast("list[Block]", list(self.blocks))
        norms = [block.norm1 for block in blocks] + [self.norm]
        weight: Tensor | None = norms[0].weight
        bias: Tensor | None = norms[0].bias
        weight, bias = sum_split_gradients((weight, bias), ("rows",) if self.sequence_parallel else (), self.tensor)
        assert weight is not None
        assert bias is not None
        normed = self.kernels.layer_norm(stream, weight, bias, config.layer_norm_eps)  # [n, D]
        tapped = []
        for i, block in enumerate(blocks):
            call: Callable[..., tuple[Tensor, Tensor]] = block
            if self.activation_checkpointing == "full" and torch.is_grad_enabled():
                call = partial(recomputed, block)
            stream, normed = call(
                stream,
                normed,
                norms[i + 1].weight,
                norms[i + 1].bias,
                angles,
                rope_scale,
                row_scale[2 * i],
                row_scale[2 * i + 1],
                num_samples,
                period,
            )
            if i in taps:
                tapped.append(stream)
        return TrunkOutput(embedding, normed, rows, period, tuple(tapped))

    def _row_scale(self, sample_index: Tensor, rows: RowShard, period: int) -> Tensor | list[None]:
        num_branches = 2 * self.config.num_layers
        if not self.training or self.config.drop_path == 0:
            return [None] * num_branches
        factors = drop_path_factors(self.config.drop_path, self.config.num_layers, self.seed, sample_index)
        sample = rows.sample_of_row(period, sample_index.shape[0], sample_index.device)
        return factors[:, sample]
