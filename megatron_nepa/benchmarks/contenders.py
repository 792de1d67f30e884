"""Who competes in the kernel benchmark: for each operation its inputs, its bytes and every implementation at hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.config import ModelConfig
from megatron_nepa.kernels.attention.backends import attention_candidates, attention_sdpa
from megatron_nepa.kernels.attention.products import attention_products
from megatron_nepa.kernels.operations import OPERATIONS

Implementation = Callable[..., Any]


@dataclass
class Contest:
    """One operation at one shape.

    Attributes:
        name: the operation's name.
        inputs: the operation's arguments.
        trained: names of the inputs that receive gradients.
        minimum_bytes: that forward and backward together must move.
        contenders: name to implementation, called with ``inputs``; the first is the definition.
        scale: size of the terms of an output that is a sum with cancellation; 0 where none is.
    """

    name: str
    inputs: dict[str, Any]
    trained: list[str]
    minimum_bytes: int
    contenders: dict[str, Implementation] = field(default_factory=dict)
    scale: float = 0.0


def contests(model: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    """The fused operations and attention of ``model`` for ``batch`` samples, with random inputs on ``device``."""
    rows, on_gpu = batch * model.sequence_length, device.type == "cuda"
    # of other packages, where they are installed
    others = {"qk_norm_rope": _flash_rotary, "swiglu": _liger_swiglu, "residual_norm": _other_residual_norms}

    def new(*shape: int, dtype: torch.dtype | None = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for operation in OPERATIONS:
        if operation.serves(model):
            entrants = _eager_and_compiled(operation.reference)
            entrants |= {"triton": operation.fused()} if on_gpu else {}
            entrants |= {} if on_gpu or operation.on_cpu is None else {"few_rows": operation.on_cpu}
            entrants |= others[operation.name]() if operation.name in others else {}
            minimum = sum(operation.minimum_bytes(model, rows, dtype.itemsize))
            inputs = operation.inputs(model, batch, new)
            yield Contest(operation.name, inputs, list(operation.trained), minimum, entrants, operation.scale)

    heads, dim = model.num_heads, model.head_size
    inputs = {"qkv": new(batch, model.sequence_length, 3, heads, dim), "causal": model.causal}
    entrants = {"sdpa": attention_sdpa}
    if on_gpu:
        entrants |= {each.__name__: each for each in attention_candidates(dim, dtype, deterministic=False)}
    else:
        compiled = torch.compile(attention_products, fullgraph=True)
        entrants |= {"products": attention_products, "compiled": compiled}
    # forward: q, k, v, out; backward: those and the gradient of out in, the gradients of q, k and v out
    minimum = 12 * rows * model.hidden_size * dtype.itemsize
    yield Contest("attention", inputs, ["qkv"], minimum, entrants)


def _eager_and_compiled(reference: Implementation) -> dict[str, Implementation]:
    return {"eager": reference, "compiled": torch.compile(reference, fullgraph=True)}


def _imported(module: str, name: str) -> Implementation | None:
    """An optional package's function, or None where the package is not installed."""
    try:
        found: Implementation | None = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found


def _liger_swiglu() -> dict[str, Implementation]:
    function = _imported("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction")
    return {} if function is None else {"liger": lambda gate_up: function.apply(gate_up, False)}  # type: ignore[attr-defined]


def _flash_rotary() -> dict[str, Implementation]:
    rotary = _imported("flash_attn.layers.rotary", "apply_rotary_emb_qkv_")
    if rotary is None:
        return {}

    def rotate(qkv: Tensor, angles: Tensor, **_: Any) -> Any:
        return rotary(qkv, angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype))

    return {"flash-attn (no norm)": rotate}


def _other_residual_norms() -> dict[str, Implementation]:
    return _apex_residual_norm() | _flash_residual_norm()


def _apex_residual_norm() -> dict[str, Implementation]:
    norm = _imported("apex.normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine")
    if norm is None:
        return {}

    def apply(
        stream: Tensor, branch: Tensor, branch_bias: Tensor, layer_scale: Tensor, row_scale: Tensor,
        norm_weight: Tensor, norm_bias: Tensor, eps: float,
    ) -> Any:  # fmt: skip
        total = stream + row_scale[:, None] * (layer_scale * (branch + branch_bias))
        return total, norm(total, norm_weight, norm_bias, total.shape[-1:], eps)

    return {"apex (norm only)": apply}


def _flash_residual_norm() -> dict[str, Implementation]:
    norm = _imported("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
    if norm is None:
        return {}

    def apply(
        stream: Tensor, branch: Tensor, row_scale: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, **_: Any
    ) -> Any:
        normed, total = norm(
            branch, norm_weight, norm_bias, residual=stream, eps=eps, rowscale=row_scale, prenorm=True,
            residual_in_fp32=True,
        )  # fmt: skip
        return total, normed

    return {"flash-attn (no LayerScale)": apply}
