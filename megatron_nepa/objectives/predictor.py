"""JEPA's predictor: features of target blocks from those of the context, by a narrow transformer.

Every target block of a sample is a sequence of its own: the context's tokens, then a mask token for each patch of the
block. Both have the fixed sine and cosine positions of their patches added (as I-JEPA), whatever positions the trunk
has.

Shapes: B samples of the micro-batch, C context patches, M target blocks of A patches, P = C + A, D the trunk's width, d
the predictor's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nepa.config import JepaObjective, ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.patch_embedding import position_parameter
from megatron_nepa.models.stack import run_blocks
from megatron_nepa.models.transformer import Block, Norm
from megatron_nepa.models.trunk import stream_dtype
from megatron_nepa.objectives.block_masks import BlockMasks
from megatron_nepa.parallel.parameters import parameter, sum_split_gradients
from megatron_nepa.parallel.rows import holds_whole_samples, join_rows, shard_rows


class Predictor(nn.Module):
    """A linear layer into the predictor's width, blocks, a norm and a linear layer back.

    Args:
        trunk: the shape of the trunk.
        objective: the predictor's.
        build: ranks, kernels and seed.
    """

    def __init__(self, trunk: ModelConfig, objective: JepaObjective, build: Build) -> None:
        super().__init__()
        self.config = config = objective.predictor_model(trunk)
        build.parallel.check_model(config)
        self.build = build
        width = config.hidden_size
        self.in_weight = parameter((width, trunk.hidden_size), "rows")
        self.in_bias = parameter((width,), "rows", constant=0.0)
        self.mask_token = parameter((width,), "rows")
        self.blocks = nn.ModuleList(Block(config, build) for _ in range(config.num_layers))
        self.norm = Norm(width)
        self.out_weight = parameter((trunk.hidden_size, width), "rows")
        self.out_bias = parameter((trunk.hidden_size,), "rows", constant=0.0)
        self.positions = position_parameter(config)

    def forward(self, context: Tensor, masks: BlockMasks) -> Tensor:
        """Predict the features of all target blocks.

        Args:
            context: the trunk's output for the context patches, this rank's rows of the replica's B C, [n, D].
            masks: of the whole micro-batch.

        Returns:
            In the order of samples, blocks and their patches: where this rank holds whole samples, or without sequence
            parallelism, a row for each patch that is predicted, [b M A, D]; where rows cut a sample, all of this rank's
            rows of the replica's B M P, of which the context's predict nothing.
        """
        build, config = self.build, self.config
        tensor, sequence_parallel = build.tensor, build.parallel.sequence_parallel
        num_samples, num_context = masks.context.shape
        num_targets = masks.targets.shape[1]
        split = ("rows",) if sequence_parallel else ()
        in_weight, in_bias, mask_token, out_weight, out_bias = sum_split_gradients(
            (self.in_weight, self.in_bias, self.mask_token, self.out_weight, self.out_bias), split, tensor
        )
        assert in_weight is not None
        assert mask_token is not None
        assert out_weight is not None
        tokens = nn.functional.linear(context, in_weight, in_bias)
        dtype = stream_dtype(config, tokens.dtype)
        assert self.positions is not None
        positions = self.positions.to(dtype)
        whole = holds_whole_samples(num_samples, tensor, sequence_parallel)
        cut = sequence_parallel and not whole
        if whole:
            masks = own_samples(masks, build)
        if cut:  # every rank joins all rows, and keeps its own below
            tokens = join_rows(tokens, num_samples * num_context, tensor)
        tokens = tokens.view(-1, num_context, config.hidden_size).to(dtype) + positions[masks.context]
        queries = mask_token.to(dtype) + positions[masks.targets]  # [b, M, A, d]
        tokens = tokens[:, None].expand(-1, num_targets, -1, -1)
        sequences = torch.cat((tokens, queries), dim=2)  # [b, M, P, d]
        period = sequences.shape[2]
        stream = sequences.flatten(0, 2)
        if cut:
            stream = shard_rows(num_samples * num_targets * period, tensor, sequence_parallel).take(stream)
        normed, _ = run_blocks(
            self.blocks,
            self.norm,
            stream,
            angles=None,
            num_samples=num_samples * num_targets,
            period=period,
            recompute=build.parallel.activation_checkpointing == "full",
        )
        if not cut:
            normed = normed.view(-1, period, config.hidden_size)[:, num_context:].flatten(0, 1)
        return nn.functional.linear(normed, out_weight, out_bias)


def own_samples(masks: BlockMasks, build: Build) -> BlockMasks:
    """The masks of the samples whose rows this tensor-parallel rank holds whole."""
    share = masks.context.shape[0] // build.tensor.size
    first = build.tensor.rank * share
    return BlockMasks(masks.context[first : first + share], masks.targets[first : first + share])
