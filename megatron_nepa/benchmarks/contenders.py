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
from megatron_nepa.kernels.cosine_loss.reference import cosine_loss_reference
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
from megatron_nepa.kernels.residual_norm.reference import residual_norm_reference
from megatron_nepa.kernels.swiglu.reference import swiglu_reference

Implementation = Callable[..., Any]


@dataclass
class Operation:
    """One operation at one shape.

    Attributes:
        name: of the operation.
        inputs: its arguments.
        trained: names of the inputs that receive gradients.
        minimum_bytes: that forward and backward together must move.
        contenders: name to implementation, called with ``inputs``; the first is the definition.
    """

    name: str
    inputs: dict[str, Any]
    trained: list[str]
    minimum_bytes: int
    contenders: dict[str, Implementation] = field(default_factory=dict)


def operations(model: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Operation]:
    """The fused operations and attention of ``model`` for ``batch`` samples, with random inputs on ``device``."""
    tokens, width, heads, dim = model.sequence_length, model.hidden_size, model.num_heads, model.head_size
    rows = batch * tokens
    fused = device.type == "cuda"

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=kind)

    def triton(name: str) -> dict[str, Implementation]:
        module = f"megatron_nepa.kernels.{name}.fused"
        return {"triton": getattr(importlib.import_module(module), f"{name}_triton")} if fused else {}

    unit = rows * width * dtype.itemsize
    inputs: dict[str, Any] = {
        "qkv": new(batch, tokens, 3, heads, dim),
        "angles": new(tokens, dim // 2, kind=torch.float32),
        "scale": None,
        "q_weight": None,
        "k_weight": None,
        "norm": True,
        "eps": model.layer_norm_eps,
    }
    contenders = _eager_and_compiled(qk_norm_rope_reference) | triton("qk_norm_rope") | _flash_rotary()
    yield Operation("qk_norm_rope", inputs, ["qkv"], 10 * unit, contenders)

    if model.mlp == "swiglu":
        inputs = {"gate_up": new(rows, 2 * model.mlp_hidden_size)}
        contenders = _eager_and_compiled(swiglu_reference) | triton("swiglu") | _liger_swiglu()
        yield Operation("swiglu", inputs, ["gate_up"], 4 * inputs["gate_up"].nbytes, contenders)

    inputs = {
        "stream": new(rows, width, kind=torch.float32),
        "branch": new(rows, width),
        "branch_bias": new(width),
        "layer_scale": new(width),
        "row_scale": torch.ones(rows, device=device),
        "norm_weight": new(width),
        "norm_bias": new(width),
        "eps": model.layer_norm_eps,
    }
    trained = [name for name in inputs if name not in ("row_scale", "eps")]
    contenders = _eager_and_compiled(residual_norm_reference) | triton("residual_norm")
    contenders |= _apex_residual_norm() | _flash_residual_norm()
    # forward: stream twice, branch, normed; backward: both streams and one gradient in and out, branch, two gradients
    minimum = 5 * inputs["stream"].nbytes + 5 * unit
    yield Operation("residual_norm", inputs, trained, minimum, contenders)

    inputs = {"prediction": new(rows, width), "target": new(rows, width)}
    inputs |= {"shift": 1, "skip": 0, "period": tokens, "first_row": 0, "num_rows": rows}
    contenders = _eager_and_compiled(cosine_loss_reference) | triton("cosine_loss")
    yield Operation("cosine_loss", inputs, ["prediction"], 5 * unit, contenders)

    inputs = {"qkv": new(batch, tokens, 3, heads, dim), "causal": model.causal}
    contenders = {"sdpa": attention_sdpa}
    if not fused:
        compiled = torch.compile(attention_products, fullgraph=True)
        contenders |= {"products": attention_products, "compiled": compiled}
    else:
        contenders |= {each.__name__: each for each in attention_candidates(dim, dtype, deterministic=False)}
    # forward: q, k, v, out; backward: those and the gradient of out in, the gradients of q, k and v out
    yield Operation("attention", inputs, ["qkv"], 12 * unit, contenders)


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
