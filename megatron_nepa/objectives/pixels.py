"""What the objectives that predict pixels share: targets, the layer that predicts them, the loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_nepa.models.build import Build
from megatron_nepa.models.patch_embedding import patchify
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.objectives.objective import PretrainingModel
from megatron_nepa.parallel.collectives import reduce_from_group
from megatron_nepa.parallel.parameters import parameter, sum_split_gradients

_EPS = 1e-6  # added to a patch's variance, as MAE's


class Reconstruction(NamedTuple):
    """What a model makes of images that it sees in part.

    Attributes:
        patches: predicted pixels, [B, N, C p p] in [-1, 1], those of the image where nothing is predicted.
        hidden: patches that are predicted, bool [B, N].
    """

    patches: Tensor
    hidden: Tensor


class PixelModel(PretrainingModel):
    """A model that predicts pixels."""

    @abstractmethod
    def reconstruct(self, images: Tensor, sample_index: Tensor) -> Reconstruction:
        """Predict what each sample's mask or prefix hides, on one rank, brought back to each patch's mean and variance.

        Args:
            images: [B, C, H, W].
            sample_index: int64 [B].
        """


def fill_in(prediction: Tensor, hidden: Tensor, images: Tensor, patch_size: int, normalized: bool) -> Reconstruction:
    """Predicted patches in an image's own.

    Args:
        prediction: [B, N, C p p], as they are trained.
        hidden: where they belong, bool [B, N].
        images: [B, C, H, W].
        patch_size: side of a patch.
        normalized: whether they are trained towards normalised pixels.
    """
    patches = pixel_targets(images, patch_size, normalize=False)
    if normalized:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        prediction = prediction * (variance + _EPS).sqrt() + mean
    return Reconstruction(torch.where(hidden[:, :, None], prediction, patches), hidden)


class RowLinear(nn.Module):
    """``x W^T + b`` on this rank's token rows; every tensor-parallel rank holds it whole.

    Args:
        in_features: width of its input.
        out_features: width of its output.
        build: the ranks that share the replica.
    """

    def __init__(self, in_features: int, out_features: int, build: Build) -> None:
        super().__init__()
        self.tensor = build.tensor
        self.split = ("rows",) if build.parallel.sequence_parallel else ()
        self.weight = parameter((out_features, in_features), "rows")
        self.bias = parameter((out_features,), "rows", constant=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [n, out]."""
        weight, bias = sum_split_gradients((self.weight, self.bias), self.split, self.tensor)
        assert weight is not None
        return nn.functional.linear(x, weight, bias)


def pixel_targets(images: Tensor, patch_size: int, normalize: bool) -> Tensor:
    """The pixels of every patch, at least in fp32.

    Args:
        images: [b, C, H, W].
        patch_size: side of a patch.
        normalize: whether each patch is brought to mean 0 and variance 1 (MAE; of n - 1, as there).

    Returns:
        [b, h w, C p p].
    """
    patches = patchify(images, patch_size)
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if not normalize:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPS).sqrt()


def pixel_loss(prediction: Tensor, target: Tensor, weight: Tensor, trunk: Trunk) -> tuple[Tensor, Tensor]:
    """Weighted sum over the replica's rows of their mean squared error.

    Args:
        prediction: this rank's rows [n, C p p].
        target: likewise, without a gradient.
        weight: share of each row in the loss, [n]; 0 leaves it out.
        trunk: whose ranks share the rows.

    Returns:
        The loss, equal on the replica's tensor-parallel ranks, and the share of each of this rank's rows, detached [n].
    """
    shares = (prediction.to(target.dtype) - target).square().mean(dim=-1) * weight
    loss = shares.sum()
    return reduce_from_group(loss, trunk.tensor) if trunk.sequence_parallel else loss, shares.detach()
