"""A linear classifier on the features of a frozen trunk (paper appendix E.2; He et al. 2022, appendix A.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_nepa.models.build import Build
from megatron_nepa.models.classifier import Linear, Pooling, pool_samples
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.parallel.batch_norm import BatchNorm
from megatron_nepa.parallel.parameters import initialize_parameters

INIT_STD = 0.01  # of the classifier's weights, as MAE's


class TrunkFeatures(nn.Module):
    """One feature of each image from a trunk that is only looked at: no gradient reaches it.

    Args:
        trunk: in its own dtype, which images are cast to.
        block: counted from 0, whose residual stream is taken, without a norm; None takes the final norm's output.
        pooling: "last" takes the last token, "mean" the mean of the patches.
    """

    def __init__(self, trunk: Trunk, block: int | None, pooling: Pooling) -> None:
        super().__init__()
        self.trunk, self.block, self.pooling = trunk, block, pooling

    @torch.no_grad()
    def forward(self, images: Tensor, sample_index: Tensor) -> Tensor:
        """Features of the whole micro-batch, fp32 [B, D], equal on its tensor-parallel ranks.

        The arguments are those of :meth:`~megatron_nepa.models.trunk.Trunk.forward`.
        """
        trunk = self.trunk
        images = images.to(trunk.norm.weight.dtype)
        output = trunk(images, sample_index, () if self.block is None else (self.block,))
        rows = output.output if self.block is None else output.taps[0]
        return pool_samples(output, rows, sample_index.shape[0], self.pooling, trunk).float()


class LinearProbe(nn.Module):
    """Features normalised over the batches of all replicas, without scale or shift, and a linear layer.

    Every tensor-parallel rank computes it on the whole micro-batch.

    Args:
        num_features: D.
        num_classes: C.
        build: ranks and seed.
        new_norm: builds the BatchNorm, over the replicas, whose batches are normalised as one; else of this rank alone.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        build: Build = Build(),
        new_norm: Callable[..., nn.Module] = BatchNorm,
    ) -> None:
        super().__init__()
        self.norm = new_norm(num_features, eps=1e-6, affine=False)
        self.classifier = Linear(num_features, num_classes, INIT_STD)
        initialize_parameters(self, build.seed, INIT_STD, build.tensor)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] to logits [B, C]."""
        logits: Tensor = self.classifier(self.norm(features[:, :, None, None]).flatten(1))
        return logits


class ProbedTrunk(nn.Module):
    """A trunk with its probe, as the classifier that it is."""

    def __init__(self, features: TrunkFeatures, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, images: Tensor, sample_index: Tensor) -> Tensor:
        """Logits of the whole micro-batch, fp32 [B, C]."""
        logits: Tensor = self.head(self.features(images, sample_index))
        return logits
