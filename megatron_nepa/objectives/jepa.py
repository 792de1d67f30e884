"""JEPA: from some patches' features, predict those of blocks of hidden ones (I-JEPA: Assran et al. 2023).

The trunk encodes the context patches alone. Their features and the places of the hidden patches are all that a narrow
predictor is given. Its targets are the features, each normalised over its channels, of the whole image under the
average of the trunk's weights. The loss is their smooth L1 distance.

Shapes: B samples of the micro-batch, b of them whose images this rank holds, C context patches, M target blocks of A
patches, P = C + A, T patches of an image, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nepa.config import JepaObjective, ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.objectives.block_masks import BlockMasks, block_masks
from megatron_nepa.objectives.objective import PretrainingModel, PretrainingOutput
from megatron_nepa.objectives.predictor import Predictor, own_samples
from megatron_nepa.objectives.sample_losses import sample_losses
from megatron_nepa.objectives.target_encoder import TargetEncoder
from megatron_nepa.parallel.collectives import gather_rows, reduce_from_group
from megatron_nepa.parallel.parameters import initialize_parameters
from megatron_nepa.parallel.rows import holds_whole_samples, shard_rows


class JepaForPretraining(PretrainingModel):
    """Predict the features of target blocks from the context's.

    Args:
        config: the trunk's shape.
        objective: masks, predictor and momentum.
        build: ranks, kernels and seed.

    Attributes:
        targets: the trunk with the average of its weights, which whoever trains the model attaches.
    """

    by_sample = True

    def __init__(self, config: ModelConfig, objective: JepaObjective = JepaObjective(), build: Build = Build()) -> None:
        super().__init__()
        self.objective = objective
        self.build = build
        self.trunk = Trunk(config, build)
        self.predictor = Predictor(config, objective, build)
        initialize_parameters(self, build.seed, config.init_std, build.tensor)
        self.targets = TargetEncoder(self.trunk, build)

    def forward(
        self, images: Tensor, sample_index: Tensor, step: int = 0, by_sample: bool = False
    ) -> PretrainingOutput:
        """Loss of a micro-batch: the mean smooth L1 distance over its target patches and their channels."""
        side = self.trunk.config.grid_size
        masks = block_masks(self.objective, (side, side), self.build.seed, step, sample_index)
        self.targets.start()  # the average is gathered while the context is encoded
        context = self.trunk(images, sample_index, kept=masks.context)
        prediction = self.predictor(context.output, masks)
        features = self.targets(images, sample_index).output
        prediction, target, weight = self._pairs(prediction, features, masks)
        prediction, target = (widened(rows) for rows in (prediction, target))
        normalised = nn.functional.layer_norm(target, target.shape[1:])
        distance = nn.functional.smooth_l1_loss(prediction, normalised, reduction="none").mean(dim=1)
        norms = [rows.detach().norm(dim=1) for rows in (prediction, target)]
        count = masks.targets.numel()
        means = torch.stack([((row if weight is None else row * weight).sum() / count) for row in (distance, *norms)])
        if self.build.parallel.sequence_parallel:
            means = reduce_from_group(means, self.build.tensor)
        loss, prediction_norm, target_norm = means.unbind()
        losses = self._sample_losses(distance.detach(), weight, masks) if by_sample else None
        embeddings = {"target": target, "prediction": prediction.detach()}
        if weight is not None:
            predicted = self._predicted_rows(masks, target.device)
            embeddings = {name: rows[predicted] for name, rows in embeddings.items()}
        return PretrainingOutput(
            loss,
            metrics={"prediction_norm": prediction_norm.detach(), "target_norm": target_norm.detach()},
            embeddings=embeddings,
            sample_loss=losses,
        )

    def _predicted_rows(self, masks: BlockMasks, device: torch.device) -> Tensor:
        """Of this rank's rows where they cut a sample, those of target patches, int64: a rank may hold none."""
        (num_samples, num_context), (num_blocks, block) = masks.context.shape, masks.targets.shape[1:]
        period = num_context + block
        rows = shard_rows(num_samples * num_blocks * period, self.build.tensor, self.build.parallel.sequence_parallel)
        ends = rows.first, min(rows.first + rows.count, rows.num_rows)
        start, stop = (end // period * block + max(0, end % period - num_context) for end in ends)
        # numbers that the host knows: choosing by a mask would make it wait for the device
        patch = torch.arange(start, max(start, stop), device=device)
        return patch // block * period + num_context + patch % block - rows.first

    def _sample_losses(self, distance: Tensor, weight: Tensor | None, masks: BlockMasks) -> Tensor:
        """Of what :meth:`_pairs` gave, the loss of each sample, [B]."""
        num_samples, num_targets, _ = masks.targets.shape
        period = masks.targets[0].numel()  # rows of a sample; where rows cut one, the context's too
        if weight is not None:
            distance, period = distance * weight, period + num_targets * masks.context.shape[1]
        rows = shard_rows(num_samples * period, self.build.tensor, self.build.parallel.sequence_parallel)
        return sample_losses(distance / masks.targets.numel(), rows, num_samples, self.trunk)

    def _pairs(self, prediction: Tensor, features: Tensor, masks: BlockMasks) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predictions and targets row by row, and which rows count, fp32 [n], or None where all do."""
        tensor, sequence_parallel = self.build.tensor, self.build.parallel.sequence_parallel
        num_samples, num_context = masks.context.shape
        num_blocks, block = masks.targets.shape[1:]
        num_patches = self.trunk.config.num_patches
        whole = holds_whole_samples(num_samples, tensor, sequence_parallel)
        if whole or not sequence_parallel:
            places = (own_samples(masks, self.build) if whole else masks).targets.flatten(1)  # [b, M A]
            index = places[..., None].expand(-1, -1, features.shape[1])
            return prediction, features.view(len(places), num_patches, -1).gather(1, index).flatten(0, 1), None
        features = gather_rows(features, tensor)[: num_samples * num_patches]
        period = num_context + block
        rows = shard_rows(num_samples * num_blocks * period, tensor, sequence_parallel)
        row = torch.arange(rows.first, rows.first + rows.count, device=features.device)
        counts = (row % period >= num_context) & (row < rows.num_rows)
        sequence = (row // period).clamp(max=num_samples * num_blocks - 1)
        place = masks.targets.flatten(0, 1)[sequence, (row % period - num_context).clamp(min=0)]
        return (
            prediction,
            features[sequence // num_blocks * num_patches + place],
            counts.to(widened(features[:0]).dtype),
        )


def widened(rows: Tensor) -> Tensor:
    """Rows in fp32, or fp64 where they are."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
