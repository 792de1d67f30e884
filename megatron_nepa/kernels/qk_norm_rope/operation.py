"""QK-norm and RoPE as the project's lists know them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.qk_norm_rope.cpu import qk_norm_rope_cpu
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
from megatron_nepa.kernels.record import Case, NewTensor, Operation


def _fused() -> Callable[..., Tensor]:
    from megatron_nepa.kernels.qk_norm_rope.fused import qk_norm_rope_triton

    return qk_norm_rope_triton


def _inputs(model: ModelConfig, batch: int, new: NewTensor) -> dict[str, Any]:
    tokens, heads, dim = model.sequence_length, model.num_heads, model.head_size
    return {
        "qkv": new(batch, tokens, 3, heads, dim),
        "angles": new(tokens, dim // 2, dtype=torch.float32),
        "scale": None,
        "q_weight": None,
        "k_weight": None,
        "norm": True,
        "eps": model.layer_norm_eps,
    }


def _minimum_bytes(model: ModelConfig, rows: int, itemsize: int) -> tuple[int, int]:
    unit = rows * model.hidden_size * itemsize
    return 4 * unit, 6 * unit


def _launches(model: ModelConfig, batch: int, tokens: int, new: NewTensor) -> Iterator[Case]:
    """The affine norm beside the plain one; it also writes what its backward pass needs, q and k as they came."""
    from megatron_nepa.kernels.qk_norm_rope import fused

    forward, backward = _minimum_bytes(model, batch * tokens, 2)
    qkv = new(batch, tokens, 3, model.num_heads, model.head_size)
    angles = new(tokens, model.head_size // 2, dtype=torch.float32)
    scale = new(batch, dtype=torch.float32)
    heads = (batch, tokens, 2, model.num_heads)
    for name, weight in (("qk_norm_rope", None), ("qk_norm_rope affine", new(model.head_size))):
        turn = (angles, scale, weight, weight, True, model.layer_norm_eps)
        saved = new(*heads, dtype=torch.float32) if weight is None else new(*heads, model.head_size)
        kept = 0 if weight is None else forward // 2
        yield Case(name, "forward", partial(fused.forward_, qkv.clone(), *turn), forward + kept)
        yield Case(name, "backward", partial(fused.backward_, qkv.clone(), qkv, saved, *turn), backward)


QK_NORM_ROPE = Operation(
    "qk_norm_rope",
    qk_norm_rope_reference,
    _fused,
    _inputs,
    trained=("qkv",),
    minimum_bytes=_minimum_bytes,
    launches=_launches,
    on_cpu=qk_norm_rope_cpu,
)
