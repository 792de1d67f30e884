"""AIM: the causal trunk predicts the pixels of the next patch (El-Nouby et al. 2024).

Beside NEPA it has the same trunk, the same shift and other targets: pixels for embeddings.

Shapes: B samples of the micro-batch, b of them whose images this rank holds, N patches of an image, P prefix tokens
(BOS), T = P + N, n token rows of this rank, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from megatron_nepa.config import IMAGE_CHANNELS, AimObjective, ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.draws import prefix_lengths
from megatron_nepa.models.transformer import FeedForward, Norm
from megatron_nepa.models.trunk import Trunk, TrunkOutput, stream_dtype
from megatron_nepa.objectives.objective import PretrainingOutput
from megatron_nepa.objectives.pixels import PixelModel, Reconstruction, RowLinear, fill_in, pixel_loss, pixel_targets
from megatron_nepa.objectives.sample_losses import sample_losses
from megatron_nepa.parallel.parameters import initialize_parameters, sum_split_gradients
from megatron_nepa.parallel.rows import place_rows


class AimForPretraining(PixelModel):
    """Predict the pixels of the next patch.

    With the prefix, a sample's leading patches attend to one another in both directions, as all patches do later, and
    only those after them are predicted. Its length is a function of the seed and the sample's number. The loss is the
    mean over each sample's predicted patches, then over the samples: a mean over the patches of a micro-batch would
    depend on which samples meet in it.

    Args:
        config: the trunk's shape.
        objective: prefix, head and targets.
        build: ranks, kernels and seed.
    """

    by_sample = True

    def __init__(self, config: ModelConfig, objective: AimObjective = AimObjective(), build: Build = Build()) -> None:
        super().__init__()
        self.objective = objective
        self.trunk = Trunk(config, build)
        self.pixel_head = Head(config, objective.head_layers, build)
        initialize_parameters(self, build.seed, config.init_std, build.tensor)

    def forward(
        self, images: Tensor, sample_index: Tensor, step: int = 0, by_sample: bool = False
    ) -> PretrainingOutput:
        """Loss of a micro-batch: the mean squared error of the pixels of the patches after the prefix."""
        trunk, objective = self.trunk, self.objective
        num_prefix, num_patches = int(trunk.config.bos_token), trunk.config.num_patches
        output, prediction, prefix = self.predict(images, sample_index)
        rows = output.rows
        target = pixel_targets(images, trunk.config.patch_size, objective.normalize_targets)
        # a row's target is the next token's patch; the last token has none
        target = nn.functional.pad(target[:, 1 - num_prefix :], (0, 0, 0, 1)).flatten(0, 1)  # [b T, C p p]
        is_share = images.shape[0] != sample_index.shape[0]
        target = place_rows(target, is_share, rows, trunk.tensor, trunk.sequence_parallel)
        predicted = torch.arange(output.period, device=prefix.device) + 1 - num_prefix  # patch of each row
        counts = (predicted >= prefix[:, None]) & (predicted < num_patches)  # [B, T]
        weight = counts.to(target.dtype) / ((num_patches - prefix[:, None]) * prefix.shape[0])
        loss, shares = pixel_loss(prediction, target, rows.take(weight.flatten()), trunk)
        losses = sample_losses(shares, rows, sample_index.shape[0], trunk) if by_sample else None
        return PretrainingOutput(loss, {}, {"encoding": output.output.detach()}, losses)

    def reconstruct(self, images: Tensor, sample_index: Tensor) -> Reconstruction:
        """Predict each patch after the prefix, from the true ones before it."""
        config, objective = self.trunk.config, self.objective
        num_prefix, num_patches = int(config.bos_token), config.num_patches
        _, rows, first = self.predict(images, sample_index)
        tokens = rows.unflatten(0, (images.shape[0], -1))[:, :-1]  # the last has no next patch
        patches = nn.functional.pad(tokens, (0, 0, 1 - num_prefix, 0))
        hidden = torch.arange(num_patches, device=first.device) >= first[:, None]
        return fill_in(patches, hidden, images, config.patch_size, objective.normalize_targets)

    def predict(self, images: Tensor, sample_index: Tensor) -> tuple[TrunkOutput, Tensor, Tensor]:
        """What the trunk makes of every patch, and the head of it.

        Args:
            images: [b, C, H, W].
            sample_index: int64 [B].

        Returns:
            The trunk's output, the pixels that this rank's rows predict of the next patch [n, C p p], and the patches
            of every sample that are not predicted, int64 [B].
        """
        config = self.trunk.config
        num_prefix = int(config.bos_token)
        if not self.objective.prefix:  # nothing comes before the first patch, or before the BOS token
            output = self.trunk(images, sample_index)
            first = torch.full_like(sample_index, 1 - num_prefix)
            return output, self.pixel_head(output.output), first
        prefix = prefix_lengths(config.num_patches, self.trunk.seed, sample_index)
        visible = prefix_attention(prefix + num_prefix, config.sequence_length)
        output = self.trunk(images, sample_index, visible=visible)
        return output, self.pixel_head(output.output), prefix


def prefix_attention(prefix: Tensor, num_tokens: int) -> Tensor:
    """Which tokens each one sees: those of the prefix, itself and those before it.

    Args:
        prefix: tokens of every sample's prefix, int64 [B].
        num_tokens: tokens T of a sample.

    Returns:
        bool [B, 1, T, T]: query, then key.
    """
    token = torch.arange(num_tokens, device=prefix.device)
    causal = token[:, None] >= token
    return (causal | (token < prefix[:, None, None]))[:, None]


class Head(nn.Module):
    """Feed-forward layers with their residual connections, of the trunk's kind and width, then a patch's pixels.

    Args:
        config: the trunk's shape.
        num_layers: feed-forward layers; 0 is a norm and a linear layer.
        build: ranks, kernels and seed.
    """

    def __init__(self, config: ModelConfig, num_layers: int, build: Build) -> None:
        super().__init__()
        self.config, self.kernels, self.tensor = config, build.kernels, build.tensor
        self.split = ("rows",) if build.parallel.sequence_parallel else ()
        self.layers = nn.ModuleList(FeedForward(config, build) for _ in range(num_layers))
        self.norms = nn.ModuleList(Norm(config.hidden_size) for _ in range(num_layers + 1))
        self.predict = RowLinear(config.hidden_size, IMAGE_CHANNELS * config.patch_size**2, build)

    def forward(self, encoded: Tensor) -> Tensor:
        """Rows [n, D] to the pixels that they predict, [n, C p p]."""
        layers, norms = cast("list[FeedForward]", list(self.layers)), cast("list[Norm]", list(self.norms))
        vectors = [each for norm in norms for each in (norm.weight, norm.bias)]
        vectors += [layer.down.bias for layer in layers]
        summed = cast("list[Tensor]", sum_split_gradients(vectors, self.split, self.tensor))
        eps = self.config.layer_norm_eps
        stream = encoded.to(stream_dtype(self.config, encoded.dtype))
        normed = self.kernels.layer_norm(stream, summed[0], summed[1], eps)
        for i, layer in enumerate(layers):
            weight, bias = summed[2 * i + 2 : 2 * i + 4]
            down_bias = summed[2 * len(norms) + i]
            stream, normed = self.kernels.residual_norm(stream, layer(normed), down_bias, None, None, weight, bias, eps)
        return self.predict(normed)
