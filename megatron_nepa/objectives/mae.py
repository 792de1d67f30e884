"""MAE: the trunk sees a quarter of the patches, a light decoder predicts the pixels of the others (He et al. 2022).

Shapes: B samples of the micro-batch, b of them whose rows or images this rank holds, N patches of an image, K of them
visible, P prefix tokens (BOS), n token rows of this rank, D width of the trunk, E of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nepa.config import IMAGE_CHANNELS, MaeObjective, ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.draws import shuffled_patches
from megatron_nepa.models.patch_embedding import position_parameter, token_index
from megatron_nepa.models.rope import rope_angles
from megatron_nepa.models.stack import run_blocks
from megatron_nepa.models.transformer import Block, Norm
from megatron_nepa.models.trunk import Trunk, TrunkOutput, stream_dtype
from megatron_nepa.objectives.objective import PretrainingOutput
from megatron_nepa.objectives.pixels import PixelModel, Reconstruction, RowLinear, fill_in, pixel_loss, pixel_targets
from megatron_nepa.objectives.sample_losses import sample_losses
from megatron_nepa.parallel.parameters import initialize_parameters, parameter, sum_split_gradients
from megatron_nepa.parallel.rows import RowShard, holds_whole_samples, join_rows, place_rows, shard_rows

_PURPOSE = "mae_mask"  # of the draw


class MaeForPretraining(PixelModel):
    """Predict the pixels of the patches that the trunk does not see.

    Which those are is a function of the seed and the sample's number; every sample keeps as many.

    Args:
        config: the trunk's shape.
        objective: mask, decoder and targets.
        build: ranks, kernels and seed.
    """

    by_sample = True

    def __init__(self, config: ModelConfig, objective: MaeObjective = MaeObjective(), build: Build = Build()) -> None:
        super().__init__()
        self.objective = objective
        self.trunk = Trunk(config, build)
        self.pixel_decoder = Decoder(config.hidden_size, objective.decoder_model(config), build)
        initialize_parameters(self, build.seed, config.init_std, build.tensor)

    def forward(
        self, images: Tensor, sample_index: Tensor, step: int = 0, by_sample: bool = False
    ) -> PretrainingOutput:
        """Loss of a micro-batch: the mean squared error of the masked patches' pixels."""
        trunk, objective = self.trunk, self.objective
        order = self.order(sample_index)
        output, prediction, rows = self.predict(images, sample_index, order)
        target = pixel_targets(images, trunk.config.patch_size, objective.normalize_targets)
        num_prefix = int(trunk.config.bos_token)
        target = nn.functional.pad(target, (0, 0, num_prefix, 0)).flatten(0, 1)  # [b (P + N), C p p]
        is_share = images.shape[0] != sample_index.shape[0]
        target = place_rows(target, is_share, rows, trunk.tensor, trunk.sequence_parallel)
        num_visible = objective.num_visible(order.shape[1])
        masked = hidden_patches(order, num_visible)  # [B, N]
        weight = nn.functional.pad(masked, (num_prefix, 0)).flatten().to(target.dtype)
        weight = rows.take(weight) / ((order.shape[1] - num_visible) * order.shape[0])
        loss, shares = pixel_loss(prediction, target, weight, trunk)
        losses = sample_losses(shares, rows, order.shape[0], trunk) if by_sample else None
        return PretrainingOutput(loss, {}, {"encoding": output.output.detach()}, losses)

    def order(self, sample_index: Tensor) -> Tensor:
        """The patches of every sample, those first that the trunk sees, int64 [B, N]."""
        trunk = self.trunk
        return shuffled_patches(trunk.config.num_patches, _PURPOSE, trunk.seed, sample_index)

    def reconstruct(self, images: Tensor, sample_index: Tensor) -> Reconstruction:
        """Predict the masked patches."""
        config, objective = self.trunk.config, self.objective
        order = self.order(sample_index)
        _, rows, _ = self.predict(images, sample_index, order)
        patches = rows.unflatten(0, (images.shape[0], -1))[:, int(config.bos_token) :]
        hidden = hidden_patches(order, objective.num_visible(config.num_patches))
        return fill_in(patches, hidden, images, config.patch_size, objective.normalize_targets)

    def predict(self, images: Tensor, sample_index: Tensor, order: Tensor) -> tuple[TrunkOutput, Tensor, RowShard]:
        """What the trunk makes of the visible patches, and the decoder of all.

        Args:
            images: [b, C, H, W].
            sample_index: int64 [B].
            order: of :meth:`order`.

        Returns:
            The trunk's output, the predicted pixels of this rank's rows of all tokens [n, C p p], and which rows those
            are.
        """
        kept = order[:, : self.objective.num_visible(order.shape[1])]
        output = self.trunk(images, sample_index, kept=kept)
        return output, *self.pixel_decoder(output, order)


def mae_mask(objective: MaeObjective, num_patches: int, seed: int, sample_index: Tensor) -> Tensor:
    """The patches of every sample that the trunk does not see, bool [B, N]."""
    order = shuffled_patches(num_patches, _PURPOSE, seed, sample_index)
    return hidden_patches(order, objective.num_visible(num_patches))


def hidden_patches(order: Tensor, num_visible: int) -> Tensor:
    """All patches but the first ``num_visible`` in ``order``, int64 [B, N]; bool [B, N]."""
    return torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :num_visible], False)


class Decoder(nn.Module):
    """Blocks on the encoded patches, with a learned mask token in the place of each other one, and their pixels.

    Args:
        width: of the encoded patches.
        config: the decoder's own shape.
        build: ranks, kernels and seed.
    """

    def __init__(self, width: int, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        self.tensor, self.kernels = build.tensor, build.kernels
        self.sequence_parallel = build.parallel.sequence_parallel
        self.recompute = build.parallel.activation_checkpointing == "full"
        self.embed = RowLinear(width, config.hidden_size, build)
        self.mask_token = parameter((config.hidden_size,), "rows")
        self.positions = position_parameter(config)
        self.blocks = nn.ModuleList(Block(config, build) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size)
        self.predict = RowLinear(config.hidden_size, IMAGE_CHANNELS * config.patch_size**2, build)

    def forward(self, encoded: TrunkOutput, order: Tensor) -> tuple[Tensor, RowShard]:
        """Predict the pixels of every patch.

        Args:
            encoded: the trunk's output on the patches that come first in ``order``.
            order: all patches of every sample, int64 [B, N].

        Returns:
            This rank's rows of all tokens, [n, C p p], and which those are.
        """
        config, num_samples = self.config, order.shape[0]
        num_prefix = int(config.bos_token)
        period = order.shape[1] + num_prefix
        rows = shard_rows(num_samples * period, self.tensor, self.sequence_parallel)
        stream = self._all_tokens(self.embed(encoded.output), encoded, order, rows)
        stream = stream.to(stream_dtype(config, stream.dtype))
        angles = None
        if config.rope:
            grid = (config.grid_size, config.grid_size)
            angles = rope_angles(*grid, config.head_size, config.rope_theta, num_prefix, stream.device)
        normed, _ = run_blocks(
            self.blocks,
            self.norm,
            stream,
            angles=angles,
            num_samples=num_samples,
            period=period,
            recompute=self.recompute,
        )
        return self.predict(normed), rows

    def _all_tokens(self, tokens: Tensor, encoded: TrunkOutput, order: Tensor, rows: RowShard) -> Tensor:
        """This rank's rows of [encoded and mask tokens in the patches' own order] with their positions, [n, E]."""
        num_prefix = int(self.config.bos_token)
        whole = holds_whole_samples(order.shape[0], self.tensor, self.sequence_parallel)
        cut = self.sequence_parallel and not whole
        if whole:
            order = order.chunk(self.tensor.size)[self.tensor.rank]
        if cut:  # every rank joins all rows, and keeps its own below
            tokens = join_rows(tokens, encoded.rows.num_rows, self.tensor)
        split = ("rows",) if self.sequence_parallel else ()
        (mask_token,) = sum_split_gradients((self.mask_token,), split, self.tensor)
        assert mask_token is not None
        tokens = tokens.unflatten(0, (order.shape[0], encoded.period))  # [b, P + K, E]
        num_masked = order.shape[1] + num_prefix - encoded.period
        masks = mask_token.to(tokens.dtype).expand(order.shape[0], num_masked, -1)
        tokens = torch.cat((tokens, masks), dim=1)  # in the order of ``order``
        place = token_index(order.argsort(dim=1), num_prefix)  # [b, P + N]
        first = torch.arange(order.shape[0], device=order.device)[:, None] * place.shape[1]
        tokens = tokens.flatten(0, 1).index_select(0, (first + place).flatten()).view_as(tokens)
        assert self.positions is not None
        placed = (tokens + self.positions.to(tokens.dtype)).flatten(0, 1)
        return rows.take(placed) if cut else placed
