"""The pre-norm transformer block (paper section 3.2).

A block is written from seam to seam. ``residual_norm`` adds a finished branch to the stream and normalises the sum for
the next branch in one pass, so a block receives its first norm already applied and applies the first norm of its
successor.

Selective activation checkpointing computes two cheap things again: the seam between the branches and the feed-forward
layer's activation. It repeats no matrix product, no attention and no collective. QK-norm and RoPE stay: they work in
place, so that they keep nothing of their own.

Shapes: B samples of the micro-batch, T tokens of a sample, N = B T token rows of the replica, n of them on this rank, D
width, F feed-forward width, H heads of this rank, d of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_nepa.config import ModelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.recomputation import called, recomputed
from megatron_nepa.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_nepa.parallel.parameters import GradientRule, parameter, sum_split_gradients


class Norm(nn.Module):
    """Affine parameters of a LayerNorm; the operations that apply it are fused with their neighbours."""

    def __init__(self, width: int, gradient: GradientRule = "rows") -> None:
        super().__init__()
        self.weight = parameter((width,), gradient, constant=1.0)
        self.bias = parameter((width,), gradient, constant=0.0)


class Attention(nn.Module):
    """Fused qkv projection, QK-norm, RoPE, attention and output projection (without its bias)."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        tensor, parallel = build.tensor, build.parallel
        self.kernels = build.kernels
        self.causal = config.causal
        self.normalize = config.qk_norm != "none"
        self.eps = config.layer_norm_eps
        self.num_local_heads = config.num_heads // tensor.size
        self.head_size = config.head_size
        width = config.hidden_size
        self.qkv = ColumnParallelLinear(width, 3 * width, tensor, parallel, sections=3)
        affine = config.qk_norm == "affine"
        self.q_norm = parameter((config.head_size,), "heads", constant=1.0) if affine else None
        self.k_norm = parameter((config.head_size,), "heads", constant=1.0) if affine else None
        self.out = RowParallelLinear(width, width, tensor, parallel)

    def forward(
        self,
        normed: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        angles: Tensor | None,
        rope_scale: Tensor | None,
        num_samples: int,
        period: int,
        visible: Tensor | None,
    ) -> Tensor:
        """[n, D] to [n, D]; ``num_samples`` samples of ``period`` tokens each."""
        fused = self.qkv(normed)  # [N, 3 H d], padded at the end where sequence parallelism needs equal parts
        num_rows = num_samples * period
        padding = fused.shape[0] - num_rows
        # cut only where there is padding: a slice's gradient is a copy into zeros
        rows = fused[:num_rows] if padding else fused
        qkv = rows.view(num_samples, period, 3, self.num_local_heads, self.head_size)  # [B, T, 3, H, d]
        qkv = self.kernels.qk_norm_rope(qkv, angles, rope_scale, q_norm, k_norm, self.normalize, self.eps)
        if visible is None:
            mixed = self.kernels.attention(qkv, self.causal)  # [B, T, H, d]
        else:
            mixed = self.kernels.attention_masked(qkv, visible)
        mixed = mixed.flatten(2).flatten(0, 1)  # [N, H d]
        output: Tensor = self.out(nn.functional.pad(mixed, (0, 0, 0, padding)) if padding else mixed)
        return output


class FeedForward(nn.Module):
    """SwiGLU or GELU feed-forward layer (without its last bias)."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        tensor, parallel = build.tensor, build.parallel
        self.kernels = build.kernels
        self.gated = config.mlp == "swiglu"
        self.call_cheap = recomputed if parallel.activation_checkpointing == "selective" else called
        width, hidden = config.hidden_size, config.mlp_hidden_size
        sections = 2 if self.gated else 1
        self.up = ColumnParallelLinear(width, sections * hidden, tensor, parallel, sections)
        self.down = RowParallelLinear(hidden, width, tensor, parallel)

    def forward(self, normed: Tensor) -> Tensor:
        """[n, D] to [n, D]."""
        hidden = self.up(normed)  # [N, F], or [N, 2F] packed [gate, up]
        if torch.compiler.is_compiling():
            # a trace would compute the projection again, too: it keeps nothing that such a call returns
            output: Tensor = self.down(self.call_cheap(self._activate, hidden))
            return output
        return self.call_cheap(self._activate_and_project, hidden)

    def _activate_and_project(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down(self._activate(hidden))  # [n, D]
        return output

    def _activate(self, hidden: Tensor) -> Tensor:
        return self.kernels.swiglu(hidden) if self.gated else nn.functional.gelu(hidden)  # [N, F]


class _Replicated(NamedTuple):
    """The parameters of a block that are not split, and of the norm after it."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_bias: Tensor
    layer_scale1: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    feed_forward_bias: Tensor
    layer_scale2: Tensor | None
    next_norm_weight: Tensor
    next_norm_bias: Tensor


class Block(nn.Module):
    """Attention and feed-forward branches on a residual stream."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.tensor = build.tensor
        self.sequence_parallel = build.parallel.sequence_parallel
        self.call_cheap = recomputed if build.parallel.activation_checkpointing == "selective" else called
        self.kernels = build.kernels
        self.eps = config.layer_norm_eps
        width, scale = config.hidden_size, config.layer_scale_init
        self.norm1 = Norm(width)
        self.attention = Attention(config, build)
        self.layer_scale1 = parameter((width,), "rows", constant=scale) if scale is not None else None
        self.norm2 = Norm(width)
        self.feed_forward = FeedForward(config, build)
        self.layer_scale2 = parameter((width,), "rows", constant=scale) if scale is not None else None

    def forward(
        self,
        stream: Tensor,
        normed: Tensor,
        next_norm_weight: Tensor,
        next_norm_bias: Tensor,
        angles: Tensor | None,
        rope_scale: Tensor | None,
        attention_scale: Tensor | None,
        feed_forward_scale: Tensor | None,
        num_samples: int,
        period: int,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block, from seam to seam.

        Args:
            stream: residual stream, this rank's rows [n, D].
            normed: ``norm1`` of it, [n, D].
            next_norm_weight: factor of the norm that follows this block, [D].
            next_norm_bias: summand of that norm, [D].
            angles: of :func:`~megatron_nepa.models.rope.rope_angles`, or None.
            rope_scale: the RoPE rescale of every sample, or None.
            attention_scale: DropPath factor of the attention branch, a row each, fp32 [n], or None.
            feed_forward_scale: DropPath factor of the feed-forward branch, likewise.
            num_samples: samples whose rows the replica holds.
            period: tokens of a sample.
            visible: which keys every query sees, bool [B, 1, T, T]; None is as the model's ``causal`` says.

        Returns:
            The new stream and its next norm, both [n, D].
        """
        shared = self._replicated(next_norm_weight, next_norm_bias)
        residual_norm = self.kernels.residual_norm
        branch = self.attention(normed, shared.q_norm, shared.k_norm, angles, rope_scale, num_samples, period, visible)
        # the last seam is kept: the next block's first one starts from its stream
        stream, normed = self.call_cheap(
            residual_norm,
            stream,
            branch,
            shared.attention_bias,
            shared.layer_scale1,
            attention_scale,
            shared.norm2_weight,
            shared.norm2_bias,
            self.eps,
        )
        branch = self.feed_forward(normed)
        return residual_norm(
            stream,
            branch,
            shared.feed_forward_bias,
            shared.layer_scale2,
            feed_forward_scale,
            shared.next_norm_weight,
            shared.next_norm_bias,
            self.eps,
        )

    def _replicated(self, next_norm_weight: Tensor, next_norm_bias: Tensor) -> _Replicated:
        """What every rank holds whole, with the sum of its gradient over the ranks where each computes a share."""
        parameters = (
            self.attention.q_norm,
            self.attention.k_norm,
            self.attention.out.bias,
            self.layer_scale1,
            self.norm2.weight,
            self.norm2.bias,
            self.feed_forward.down.bias,
            self.layer_scale2,
            next_norm_weight,
            next_norm_bias,
        )
        split: tuple[str, ...] = ("heads", "rows") if self.sequence_parallel else ("heads",)
        return _Replicated(*sum_split_gradients(parameters, split, self.tensor))  # type: ignore[arg-type]
