"""The seam between two branches: scale a branch, add it to the residual stream, normalise for the next one.

The cast rule of every LayerNorm in the model: the stream comes in its own dtype (fp32 by default), statistics and
affine are fp32, and the result leaves in the dtype of the norm's weight, the dtype of the product that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of [n, D] rows under the cast rule of this module; returns [n, D] in ``weight``'s dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed.to(weight.dtype)


def residual_norm_reference(
    stream: Tensor,
    branch: Tensor,
    branch_bias: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``stream += row_scale * layer_scale * (branch + branch_bias)``, then LayerNorm of the sum.

    Args:
        stream: residual stream, [n, D], fp32 by default.
        branch: output of the branch's last projection, without its bias, [n, D].
        branch_bias: that projection's bias, [D].
        layer_scale: LayerScale gamma, [D], or None.
        row_scale: DropPath factor of every row, fp32 [n]: 0 or 1 / keep probability; None means 1.
        norm_weight: factor of the LayerNorm that follows, [D].
        norm_bias: summand of that norm, [D].
        eps: added to the variance in fp32.

    Returns:
        The new stream [n, D] in ``stream``'s dtype and its LayerNorm [n, D] in ``norm_weight``'s dtype.
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    update = branch.to(wide) + branch_bias.to(wide)
    if layer_scale is not None:
        update = update * layer_scale.to(wide)
    if row_scale is not None:
        update = update * row_scale[:, None]
    total = stream.to(wide) + update
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps)
    return total.to(stream.dtype), normed.to(norm_weight.dtype)
