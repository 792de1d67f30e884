"""BatchNorm over the samples of several ranks (torch's SyncBatchNorm refuses CPU tensors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nepa.config import require
from megatron_nepa.parallel.parameters import parameter

MOMENTUM = 0.1  # share of a new batch in the running statistics, torch's default


class BatchNorm(nn.Module):
    """Normalise each channel of [B, C, H, W] over the batches of a group's ranks, as one rank would the joined batch.

    Equal to ``torch.nn.BatchNorm2d`` on one rank. Statistics are computed and kept in fp32 or wider, whatever the dtype
    of the input and the weights. A batch with a value that is not finite leaves the running statistics of its channel
    as they were: it costs one step, not the run.

    The gradients of ``weight`` and ``bias`` are this rank's share, as those of every layer are.

    Args:
        num_channels: C.
        group: ranks that share the statistics, each with equally many values a channel; None: this rank alone.
        eps: added to the variance.
        affine: whether weight and bias are parameters; else they are 1 and 0.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_channels: int,
        group: dist.ProcessGroup | None = None,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if affine:
                self.register_parameter(name, parameter((num_channels,), "images", constant=value))
            else:
                self.register_buffer(name, torch.full((num_channels,), value), persistent=False)
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same, by the batch's statistics in training and the running ones in evaluation.

        Raises:
            ConfigError: in training, where the ranks together hold a single value a channel.
        """
        if not self.training:
            return _apply_statistics(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        output, mean, variance, count = _SynchronizedNorm.apply(x, self.weight, self.bias, self.eps, self.group)
        self._update(mean, variance * (count / (count - 1)))  # the running variance is the unbiased one
        return output

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        finite = mean.isfinite() & variance.isfinite()
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(finite, torch.lerp(running, batch.to(running.dtype), MOMENTUM), running))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        # a cast of the model to bf16 leaves the running statistics in fp32: in bf16 they would stop moving
        for name, before in kept.items():
            after = self.get_buffer(name)
            setattr(self, name, before.to(after.device, torch.promote_types(after.dtype, torch.float32)))
        return self


class _SynchronizedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        mean, variance, count = _joint_statistics(x, group)
        require(
            count > 1,
            f"BatchNorm in training needs more than one value a channel, but the batch of all ranks is a single "
            f"{x.shape[2]} x {x.shape[3]} map: use a micro_batch_size of 2 or more, or more data-parallel ranks.",
        )
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.group, ctx.count = group, count
        ctx.mark_non_differentiable(mean, variance)
        return _apply_statistics(x, mean, variance, weight, bias, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        mean, inverse_std, scale = (c[:, None, None] for c in (mean, inverse_std, weight * inverse_std))
        normalized = (x - mean) * inverse_std
        share = torch.stack((grad.sum((0, 2, 3), dtype=mean.dtype), (grad * normalized).sum((0, 2, 3))))  # [2, C]
        total = share
        if ctx.group is not None:
            total = share.clone()
            dist.all_reduce(total, group=ctx.group)
        along_bias, along_weight = (total / ctx.count)[:, :, None, None]
        grad_x = scale * (grad - along_bias - normalized * along_weight)
        return grad_x.to(x.dtype), share[1].to(weight.dtype), share[0].to(weight.dtype), None, None


def _joint_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel over the group, in fp32 or wider [C], and the number of its values."""
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    count = x.numel() // x.shape[1]
    if group is None:
        return mean, variance, count
    num_ranks = dist.get_world_size(group)
    every = mean.new_empty(num_ranks, 2, x.shape[1])
    dist.all_gather_into_tensor(every, torch.stack((mean, variance))[None], group=group)
    means, variances = every.unbind(1)
    # the variance of the whole is the mean of the parts' variances and the variance of their means
    return means.mean(0), variances.mean(0) + means.var(0, correction=0), count * num_ranks


def _apply_statistics(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
