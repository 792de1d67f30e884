"""The fused kernels on a real GPU by the rule of the interpreter's tests, and attention's real back-ends."""

import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_nepa.kernels.attention.backends import attention_candidates, attention_sdpa
from megatron_nepa.kernels.attention.flash import flash_attention_2
from megatron_nepa.kernels.cosine_loss.reference import cosine_loss_reference
from megatron_nepa.kernels.dispatch import select_kernels
from megatron_nepa.kernels.launching.timing import milliseconds
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
from megatron_nepa.kernels.residual_norm.reference import layer_norm_reference, residual_norm_reference
from megatron_nepa.kernels.swiglu.reference import swiglu_reference
from tests.kernels.kernel_rule import assert_rule

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-12


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def fused(name: str) -> Callable[..., Any]:
    """The Triton operation; in-place ones get the output of another operation, as in the model."""
    function = getattr(select_kernels("triton", "cuda"), name)
    return (lambda qkv, **others: function(qkv * 1, **others)) if name == "qk_norm_rope" else function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 37), (257, 2048), (300, 2752)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    tensors: dict[str, Any] = {"gate_up": normal(rows, 2 * width, dtype=dtype)}
    assert_rule(fused("swiglu"), swiglu_reference, tensors, ["gate_up"], [normal(rows, width, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(3, 32), (12, 64), (16, 80), (5, 96), (33, 128)])
def test_qk_norm_rope(heads: int, dim: int, affine: bool, dtype: torch.dtype) -> None:
    weights = {name: normal(dim, dtype=dtype) if affine else None for name in ("q_weight", "k_weight")}
    angles = normal(257, dim // 2) * 4
    angles[0] = 0
    tensors: dict[str, Any] = {
        "qkv": normal(3, 257, 3, heads, dim, dtype=dtype),
        "angles": angles,
        "scale": normal(3).exp(),
    }
    tensors |= {**weights, "norm": True, "eps": EPS}
    differentiable = ["qkv"] + [name for name in weights if affine]
    upstream = [normal(3, 257, 3, heads, dim, dtype=dtype)]
    assert_rule(fused("qk_norm_rope"), qk_norm_rope_reference, tensors, differentiable, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 33), (5000, 768), (257, 4096)])
def test_residual_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    tensors: dict[str, Any] = {"stream": normal(rows, width), "branch": normal(rows, width, dtype=dtype)}
    tensors |= {"branch_bias": normal(width, dtype=dtype), "layer_scale": 0.3 + 0.4 * torch.rand(width, device="cuda")}
    tensors |= {"row_scale": (torch.rand(rows, device="cuda") > 0.3) / 0.7}
    tensors |= {"norm_weight": normal(width, dtype=dtype), "norm_bias": normal(width, dtype=dtype), "eps": EPS}
    differentiable = [name for name in tensors if name not in ("row_scale", "eps")]
    upstream = [normal(rows, width), normal(rows, width, dtype=dtype)]
    assert_rule(fused("residual_norm"), residual_norm_reference, tensors, differentiable, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [(1, 0, 257, 0, 514), (1, 0, 257, 100, 514), (0, 1, 257, 0, 514)])
def test_cosine_loss(layout: tuple[int, ...], dtype: torch.dtype) -> None:
    names = ("shift", "skip", "period", "first_row", "num_rows")
    tensors: dict[str, Any] = {"prediction": normal(414, 768, dtype=dtype), "target": normal(415, 768, dtype=dtype)}
    tensors |= dict(zip(names, layout, strict=True))
    upstream = [torch.tensor(0.25, device="cuda")]
    assert_rule(fused("cosine_loss"), cosine_loss_reference, tensors, ["prediction"], upstream, scale=1.0)


def test_first_layer_norm() -> None:
    chosen = select_kernels("auto", "cuda").layer_norm
    tensors: dict[str, Any] = {"x": normal(257, 768), "weight": normal(768, dtype=torch.bfloat16)}
    tensors |= {"bias": normal(768, dtype=torch.bfloat16)}
    assert_rule(
        lambda x, weight, bias: chosen(x, weight, bias, EPS),
        lambda x, weight, bias: layer_norm_reference(x, weight, bias, EPS),
        tensors,
        ["x", "weight", "bias"],
        [normal(257, 768, dtype=torch.bfloat16)],
    )


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention(causal: bool, deterministic: bool) -> None:
    flash = flash_attention_2(deterministic)
    assert flash is not None
    tensors: dict[str, Any] = {"qkv": normal(2, 257, 3, 12, 64, dtype=torch.bfloat16)}
    upstream = [normal(2, 257, 12, 64, dtype=torch.bfloat16)]
    assert_rule(lambda qkv: flash(qkv, causal), lambda qkv: attention_sdpa(qkv, causal), tensors, ["qkv"], upstream)


def test_every_attention_back_end_agrees_and_one_is_chosen(caplog: pytest.LogCaptureFixture) -> None:
    qkv = normal(2, 257, 3, 12, 64, dtype=torch.bfloat16)
    expected = attention_sdpa(qkv.double(), True)
    for attention in attention_candidates(64, torch.bfloat16, deterministic=False):
        assert (attention(qkv, True) - expected).abs().max() < 2e-2, attention.__name__
    with caplog.at_level(logging.INFO):
        chosen = select_kernels("auto", "cuda", attention_shape=(2, 257, 12, 64)).attention
    assert f"attention: {chosen.__name__};" in caplog.text


def test_a_block_of_operations_compiles_in_one_graph() -> None:
    """In bf16, as flash-attn takes it; the two runs round at other places, so that their gradients differ a little."""
    kernels = select_kernels("triton", "cuda")
    weight = (normal(192, 3 * 192) / 192**0.5).to(torch.bfloat16).requires_grad_()
    inputs, angles = normal(2 * 257, 192, dtype=torch.bfloat16), normal(257, 32)

    def step(inputs: Tensor) -> Tensor:
        qkv = (inputs @ weight).view(2, 257, 3, 3, 64)
        mixed = kernels.attention(kernels.qk_norm_rope(qkv, angles, None, None, None, True, EPS), True)
        return kernels.swiglu(mixed.flatten(2).flatten(0, 1) @ weight[:, :384]).float().square().mean()

    (expected,) = torch.autograd.grad(step(inputs), weight)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(inputs), weight)
    assert (got - expected).float().norm() < 0.03 * expected.float().norm()


def test_time_spent_in_python_is_not_the_devices() -> None:
    """Each call keeps the host for 2 ms and the device for a few microseconds."""
    x = normal(16)

    def call() -> None:
        time.sleep(2e-3)
        x.add_(1)

    assert milliseconds(call, x.device) < 0.5
