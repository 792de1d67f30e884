"""What pre-training asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from megatron_nepa.models.trunk import Trunk


class PretrainingOutput(NamedTuple):
    """Result of one micro-batch.

    Attributes:
        loss: mean over what the replica's micro-batch predicts, fp32 scalar, equal on its tensor-parallel ranks.
        metrics: what the log shows besides, by name: means over the same, detached fp32 scalars.
        embeddings: this rank's rows of which the log shows the spread, by name, detached, each [m, D]: a collapse shows
            there, not in the loss.
        sample_loss: where it was asked for, the loss of each of the replica's samples, detached, fp32 [B], equal on its
            tensor-parallel ranks; their mean is the loss.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    sample_loss: Tensor | None = None


class PretrainingModel(nn.Module, ABC):
    """A trunk and what an objective adds to it.

    Whatever it draws is a function of the run's seed and the sample's number or its step, and its loss is a mean over
    the samples: results then do not depend on ranks, micro-batches or restarts. Its own parameters are made by
    :func:`~megatron_nepa.parallel.parameters.parameter` or the layers of :mod:`megatron_nepa.parallel`, and drawn by
    :func:`~megatron_nepa.parallel.parameters.initialize_parameters`. They are the run's alone: fine-tuning, probes and
    exports take the trunk and leave them.

    Attributes:
        trunk: what is pre-trained.
        by_sample: whether :meth:`forward` takes a fourth argument, which asks for the loss of each sample: a mixture's
            log then has that of each source.
    """

    trunk: Trunk
    by_sample: ClassVar[bool] = False

    @abstractmethod
    def forward(self, images: Tensor, sample_index: Tensor, step: int = 0) -> PretrainingOutput:
        """Loss of a micro-batch.

        Args:
            images: as :meth:`~megatron_nepa.models.trunk.Trunk.forward` takes them.
            sample_index: sample numbers of the whole micro-batch, int64 [B].
            step: optimizer step that the samples belong to, counted from 0: for draws of which shapes depend, since
                the host knows it.
        """
