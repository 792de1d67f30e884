"""NEPA: the trunk predicts the embedding of the next patch by its direction (paper section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nepa.config import ModelConfig, NepaObjective
from megatron_nepa.kernels.cosine_loss.reference import loss_by_sample
from megatron_nepa.models.build import Build
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.objectives.objective import PretrainingModel, PretrainingOutput
from megatron_nepa.parallel.collectives import reduce_from_group
from megatron_nepa.parallel.parameters import initialize_parameters


class NepaForPretraining(PretrainingModel):
    """Predict the embedding of the next patch.

    Args:
        config: the model's shape.
        objective: the loss and its ablations.
        build: ranks, kernels and seed.
    """

    by_sample = True

    def __init__(self, config: ModelConfig, objective: NepaObjective = NepaObjective(), build: Build = Build()) -> None:
        super().__init__()
        self.objective = objective
        self.trunk = Trunk(config, build, objective.mask_ratio)
        initialize_parameters(self, build.seed, config.init_std, build.tensor)

    def forward(
        self, images: Tensor, sample_index: Tensor, step: int = 0, by_sample: bool = False
    ) -> PretrainingOutput:
        """Loss of a micro-batch: the mean negative cosine of its pairs.

        Args:
            images: as :meth:`~megatron_nepa.models.trunk.Trunk.forward` takes them.
            sample_index: sample numbers of the whole micro-batch, int64 [B].
            step: plays no part.
            by_sample: give the loss of each sample besides.
        """
        trunk = self.trunk
        output = trunk(images, sample_index)
        embedding, prediction, rows = output.embedding, output.output, output.rows
        target = embedding.detach() if self.objective.stop_gradient else embedding
        shift = int(self.objective.shift)
        # without the shift every patch predicts itself; the BOS token is no patch and stays out
        skip = int(trunk.config.bos_token and shift == 0)
        layout = (shift, skip, output.period, rows.first, rows.num_rows)
        share, health = trunk.kernels.cosine_loss(prediction, target, *layout)
        losses = loss_by_sample(prediction.detach(), target.detach(), *layout) if by_sample else None
        if trunk.sequence_parallel:
            parts = [share[None], health, *(() if losses is None else (losses,))]
            loss, health, *rest = reduce_from_group(torch.cat(parts), trunk.tensor).split([len(part) for part in parts])
            share, health, losses = loss[0], health.detach(), rest[0].detach() if rest else None
        _, prediction_norm, target_norm = health
        return PretrainingOutput(
            share,
            metrics={"prediction_norm": prediction_norm, "target_norm": target_norm},
            # without the halo row
            embeddings={"target": embedding.detach()[: prediction.shape[0]], "prediction": prediction.detach()},
            sample_loss=losses,
        )
