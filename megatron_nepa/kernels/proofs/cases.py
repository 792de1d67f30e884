"""The kernel launches of a model, one case an operation and direction, with the bytes that each must move at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.cosine_loss import fused as cosine_loss_triton
from megatron_nepa.kernels.qk_norm_rope import fused as qk_norm_rope_triton
from megatron_nepa.kernels.residual_norm import fused as residual_norm_triton
from megatron_nepa.kernels.swiglu import fused as swiglu_triton

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel launch.

    Attributes:
        operation: name of the fused operation.
        direction: forward or backward.
        call: launches it.
        minimum_bytes: what it must read and write in device memory, each tensor once, without statistics, tables,
            parameters and partial sums.
    """

    operation: str
    direction: str
    call: Callable[[], object]
    minimum_bytes: int


def model_cases(model: ModelConfig, batch: int, tokens: int, device: str) -> Iterator[Case]:
    """Every launch of one block and of the loss, for ``batch`` samples of ``tokens`` tokens in bf16 on ``device``.

    The optional parts are on (affine QK-norm beside the plain one, RoPE rescale, LayerScale, DropPath), since they
    can only cost registers. ``device`` may be ``meta``: then the launches must be intercepted.
    """
    rows, width, eps = batch * tokens, model.hidden_size, model.layer_norm_eps
    unit = 2 * rows * width  # bytes of one bf16 [rows, D] tensor

    def new(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    qkv = new(batch, tokens, 3, model.num_heads, model.head_size)
    angles = new(tokens, model.head_size // 2, dtype=torch.float32)
    scale = new(batch, dtype=torch.float32)
    for name, weight in (("qk_norm_rope", None), ("qk_norm_rope affine", new(model.head_size))):
        turn = (angles, scale, weight, weight, True, eps)
        heads = (batch, tokens, 2, model.num_heads)
        saved = new(*heads, dtype=torch.float32) if weight is None else new(*heads, model.head_size)
        forward_bytes = (4 if weight is None else 6) * unit

        forward: Callable[..., object] = partial(qk_norm_rope_triton.forward_, qkv.clone(), *turn)
        backward: Callable[..., object] = partial(qk_norm_rope_triton.backward_, qkv.clone(), qkv, saved, *turn)
        yield Case(name, "forward", forward, forward_bytes)
        yield Case(name, "backward", backward, 6 * unit)

    if model.mlp == "swiglu":
        gate_up, hidden = new(rows, 2 * model.mlp_hidden_size), new(rows, model.mlp_hidden_size)
        yield Case("swiglu", "forward", partial(swiglu_triton.forward, gate_up), 3 * hidden.nbytes)
        yield Case("swiglu", "backward", partial(swiglu_triton.backward_, hidden, gate_up), 5 * hidden.nbytes)

    stream, branch = new(rows, width, dtype=torch.float32), new(rows, width)
    vector, row_scale = new(width), new(rows, dtype=torch.float32)
    seam = (vector, vector, row_scale, vector)  # branch bias, LayerScale, DropPath, norm weight
    forward = partial(residual_norm_triton.forward, stream, branch, *seam, vector, eps)
    inputs = (stream, branch, stream.clone(), branch.clone())
    backward = partial(residual_norm_triton.backward, *inputs, *seam, eps, BF16)
    yield Case("residual_norm", "forward", forward, 6 * unit)
    yield Case("residual_norm", "backward", backward, 9 * unit)

    layout = (1, 0, tokens, 0, rows)
    forward = partial(cosine_loss_triton.forward, branch, branch.clone(), *layout)
    sums = new(3, dtype=torch.float32)
    backward = partial(cosine_loss_triton.backward, sums, branch, branch.clone(), *layout)
    yield Case("cosine_loss", "forward", forward, 2 * unit)
    yield Case("cosine_loss", "backward", backward, 3 * unit)
