"""Image classification on top of the trunk (paper section 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from megatron_nepa.config import ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.transformer import Norm
from megatron_nepa.models.trunk import Trunk, TrunkOutput
from megatron_nepa.parallel.collectives import gather_rows
from megatron_nepa.parallel.parameters import initialize_parameters, parameter
from megatron_nepa.parallel.rows import holds_whole_samples

Pooling = Literal["last", "mean"]


class Linear(nn.Module):
    """``x W^T + b``, whole on every rank, drawn as 0 or with standard deviation ``std``."""

    def __init__(self, in_features: int, out_features: int, std: float = 0.0) -> None:
        super().__init__()
        self.weight = parameter((out_features, in_features), "whole", constant=None if std else 0.0, std=std)
        self.bias = parameter((out_features,), "whole", constant=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] to [B, out]."""
        return nn.functional.linear(x, self.weight, self.bias)


class Classifier(nn.Module):
    """The trunk, one embedding of each image, and a linear layer that starts at 0.

    Every tensor-parallel rank computes the head on the whole micro-batch: its cost is next to nothing, and its
    gradients need no sum.

    Args:
        config: the trunk's shape.
        num_classes: C.
        pooling: what is classified: the last token's output (paper), or the mean of the patches' outputs after a
            LayerNorm of its own (release).
        build: ranks, kernels and seed.
    """

    def __init__(self, config: ModelConfig, num_classes: int, pooling: Pooling, build: Build = Build()) -> None:
        super().__init__()
        self.pooling = pooling
        self.trunk = Trunk(config, build)
        self.fc_norm = Norm(config.hidden_size, "whole") if pooling == "mean" else None
        self.classifier = Linear(config.hidden_size, num_classes)
        initialize_parameters(self, build.seed, config.init_std, build.tensor)

    def forward(self, images: Tensor, sample_index: Tensor) -> Tensor:
        """Logits of the whole micro-batch, fp32 [B, C], equal on its tensor-parallel ranks.

        The arguments are those of :meth:`~megatron_nepa.models.trunk.Trunk.forward`.
        """
        trunk = self.trunk
        output = trunk(images, sample_index)
        pooled = pool_samples(output, output.output, sample_index.shape[0], self.pooling, trunk)
        if self.fc_norm is not None:
            pooled = trunk.kernels.layer_norm(
                pooled, self.fc_norm.weight, self.fc_norm.bias, trunk.config.layer_norm_eps
            )
        logits: Tensor = self.classifier(pooled.to(self.classifier.weight.dtype))
        return logits.float()


def pool_samples(output: TrunkOutput, rows: Tensor, num_samples: int, pooling: Pooling, trunk: Trunk) -> Tensor:
    """One embedding of every sample of the micro-batch, on every tensor-parallel rank.

    Args:
        output: what the trunk returned.
        rows: this rank's token rows of any block, [n, D].
        num_samples: B.
        pooling: "last" takes the last token, "mean" the mean of the patches in fp32 (the BOS token left out).
        trunk: the trunk that computed them.

    Returns:
        [B, D]: in the rows' dtype for "last", fp32 for "mean".
    """
    period, tensor = output.period, trunk.tensor
    whole_samples = holds_whole_samples(num_samples, tensor, trunk.sequence_parallel)
    if trunk.sequence_parallel and not whole_samples:  # rows that cut a sample: join them, drop the padding
        rows = gather_rows(rows, tensor)[: output.rows.num_rows]
    tokens = rows.view(-1, period, rows.shape[-1])  # [b, T, D]
    if pooling == "last":
        pooled = tokens[:, -1]
    else:
        pooled = tokens[:, int(trunk.config.bos_token) :].mean(dim=1, dtype=torch.float32)
    return gather_rows(pooled, tensor) if whole_samples else pooled
