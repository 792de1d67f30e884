"""What every fused operation promises besides its numbers: schema, meta form, autograd, refusals, in-place rules."""

import pytest
import torch
from torch.library import opcheck

from megatron_nepa.kernels.cosine_loss import fused as cosine_loss_triton
from megatron_nepa.kernels.qk_norm_rope import fused as qk_norm_rope_triton
from megatron_nepa.kernels.residual_norm import fused as residual_norm_triton
from megatron_nepa.kernels.swiglu import fused as swiglu_triton

ops = torch.ops.megatron_nepa
EPS = 1e-12


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def opcheck_cases():
    angles, scale, weight = torch.randn(3, 16), torch.rand(2), torch.randn(32)
    qkv = torch.randn(2, 3, 3, 2, 32)
    rstd, kept = torch.rand(2, 3, 2, 2), torch.randn(2, 3, 2, 2, 32)
    vector = torch.randn(8)
    yield "swiglu", ops.swiglu, (leaf(3, 16),)
    yield "swiglu backward", ops.swiglu_backward_, (torch.randn(3, 8), torch.randn(3, 16))
    for name, weights in (("plain", (None, None)), ("affine", (weight, weight))):
        saved = rstd if name == "plain" else kept
        yield f"qk_norm_rope {name}", ops.qk_norm_rope_, (qkv.clone(), angles, scale, *weights, True, EPS)
        yield (
            f"qk_norm_rope backward {name}",
            ops.qk_norm_rope_backward_,
            (qkv.clone(), qkv.clone(), saved, angles, scale, *weights, True, EPS),
        )
    of_samples = torch.randn(2, 3, 16)
    yield "qk_norm_rope by sample", ops.qk_norm_rope_, (qkv.clone(), of_samples, scale, None, None, True, EPS)
    yield "qk_norm_rope no norm", ops.qk_norm_rope_, (qkv.clone(), angles, None, None, None, False, EPS)
    full = (leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), torch.rand(3), leaf(8), leaf(8), EPS)
    yield "residual_norm", ops.residual_norm, full
    yield "residual_norm plain", ops.residual_norm, (*full[:3], None, None, *full[5:])
    rows = torch.randn(3, 8)
    arguments = (rows, rows, rows, rows, vector, vector, torch.rand(3), vector, EPS, torch.bfloat16)
    yield "residual_norm backward", ops.residual_norm_backward, arguments
    yield "cosine_loss", ops.cosine_loss, (leaf(6, 8), torch.randn(6, 8), 1, 0, 3, 0, 6)
    arguments = (torch.ones(3), torch.randn(6, 8), torch.randn(6, 8), 1, 0, 3, 0, 6)
    yield "cosine_loss backward", ops.cosine_loss_backward, arguments


@pytest.mark.parametrize("case", opcheck_cases(), ids=lambda case: case[0])
def test_opcheck(case):
    _, op, arguments = case
    opcheck(op.default, arguments)


def test_second_backward_through_swiglu_raises():
    out = swiglu_triton.swiglu_triton(leaf(3, 16) * 1).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_swiglu_leaves_the_callers_own_tensor_alone():
    gate_up = leaf(3, 16)
    before = gate_up.detach().clone()
    swiglu_triton.swiglu_triton(gate_up).sum().backward()
    assert torch.equal(gate_up, before)


def test_second_backward_through_qk_norm_rope_is_right():
    """It overwrites only the gradient that reaches it, which is new each time."""
    qkv = leaf(1, 2, 3, 2, 32)
    out = qk_norm_rope_triton.qk_norm_rope_triton(qkv * 1, torch.randn(2, 16), None, None, None, True, EPS).sin().sum()
    (first,) = torch.autograd.grad(out, qkv, retain_graph=True)
    (second,) = torch.autograd.grad(out, qkv)
    assert torch.equal(first, second)


def test_qk_norm_rope_works_in_place_without_copies():
    """qkv is a view of the projection's output; autograd must not wrap the operation in CopySlices."""
    projected = leaf(2, 192) * 1
    qkv = projected.view(1, 2, 3, 2, 32)
    out = qk_norm_rope_triton.qk_norm_rope_triton(qkv, torch.randn(2, 16), None, None, None, True, EPS)
    assert out.data_ptr() == projected.data_ptr()
    assert "QKNormRope" in out.grad_fn.name()


def test_a_tensor_saved_from_qkv_before_it_was_overwritten_raises():
    qkv = leaf(1, 2, 3, 2, 32) * 1
    squared = qkv.square().sum()
    qk_norm_rope_triton.qk_norm_rope_triton(qkv, torch.randn(2, 16), None, None, None, True, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def qk_norm_rope(qkv=None, angles=None, scale=None, q_weight=None, k_weight=None):
    qkv = torch.randn(2, 3, 3, 2, 32) if qkv is None else qkv
    return qk_norm_rope_triton.qk_norm_rope_triton(qkv, angles, scale, q_weight, k_weight, True, EPS)


def residual_norm(**replaced):
    arguments = {"stream": torch.randn(3, 8), "branch": torch.randn(3, 8), "branch_bias": torch.randn(8)}
    arguments |= {"layer_scale": None, "row_scale": None, "norm_weight": torch.ones(8), "norm_bias": torch.zeros(8)}
    return residual_norm_triton.residual_norm_triton(**(arguments | replaced), eps=EPS)


def cosine_loss(prediction=None, target=None, layout=(1, 0, 3, 0, 6)):
    prediction = torch.randn(6, 8) if prediction is None else prediction
    return cosine_loss_triton.cosine_loss_triton(prediction, torch.randn(6, 8) if target is None else target, *layout)


def swiglu(gate_up):
    return swiglu_triton.swiglu_triton(gate_up)


def transposed(*shape):
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


REFUSALS = {
    "swiglu shape": (lambda: swiglu(torch.randn(2, 3, 4)), r"gate_up has shape \[2, 3, 4\]"),
    "swiglu odd": (lambda: swiglu(torch.randn(2, 7)), "gate_up has 7 columns"),
    "swiglu dtype": (lambda: swiglu(torch.randn(2, 8).double()), "gate_up is float64"),
    "swiglu strides": (lambda: swiglu(transposed(2, 8)), r"gate_up has strides \[1, 2\]"),
    "qkv shape": (lambda: qk_norm_rope(torch.randn(2, 3, 2, 2, 32)), "qkv has shape"),
    "qkv dtype": (lambda: qk_norm_rope(torch.randn(2, 3, 3, 2, 32).half()), "qkv is float16"),
    "qkv head dim": (lambda: qk_norm_rope(torch.randn(2, 3, 3, 2, 48)), "qkv has head dim 48"),
    "qkv strides": (lambda: qk_norm_rope(transposed(2, 3, 3, 2, 32)), "qkv has strides"),
    "qkv leaf": (lambda: qk_norm_rope(leaf(2, 3, 3, 2, 32)), "qkv is a leaf"),
    "angles shape": (lambda: qk_norm_rope(angles=torch.randn(4, 16)), r"angles has shape \[4, 16\]"),
    "angles samples": (lambda: qk_norm_rope(angles=torch.randn(3, 3, 16)), r"angles has shape \[3, 3, 16\]"),
    "angles dtype": (lambda: qk_norm_rope(angles=torch.randn(3, 16).bfloat16()), "angles is bfloat16"),
    "scale alone": (lambda: qk_norm_rope(scale=torch.ones(2)), "angles is None"),
    "scale shape": (lambda: qk_norm_rope(angles=torch.randn(3, 16), scale=torch.ones(3)), "scale has shape"),
    "one weight": (lambda: qk_norm_rope(q_weight=torch.ones(32)), "go together"),
    "weight shape": (lambda: qk_norm_rope(q_weight=torch.ones(64), k_weight=torch.ones(32)), "q_weight has shape"),
    "stream shape": (lambda: residual_norm(stream=torch.randn(24)), "stream has shape"),
    "stream width": (lambda: residual_norm(stream=torch.randn(3, 16385)), "stream has 16385 columns"),
    "branch shape": (lambda: residual_norm(branch=torch.randn(3, 7)), "branch has shape"),
    "branch strides": (lambda: residual_norm(branch=transposed(3, 8)), "branch has strides"),
    "bias shape": (lambda: residual_norm(branch_bias=torch.randn(9)), "branch_bias has shape"),
    "layer scale": (lambda: residual_norm(layer_scale=torch.randn(1)), "layer_scale has shape"),
    "row scale": (lambda: residual_norm(row_scale=torch.ones(3).bfloat16()), "row_scale is bfloat16"),
    "norm weight": (lambda: residual_norm(norm_weight=torch.ones(8).double()), "norm_weight is float64"),
    "norm bias": (lambda: residual_norm(norm_bias=torch.ones(4)), "norm_bias has shape"),
    "prediction strides": (lambda: cosine_loss(transposed(6, 8)), "prediction has strides"),
    "target width": (lambda: cosine_loss(target=torch.randn(6, 4)), "target has shape"),
    "halo": (lambda: cosine_loss(torch.randn(5, 8), torch.randn(5, 8), (1, 0, 3, 2, 9)), "target has 5 rows"),
    "no pairs": (lambda: cosine_loss(layout=(1, 1, 2, 0, 6)), "leave no pairs"),
    "rows": (lambda: cosine_loss(layout=(1, 0, 4, 0, 6)), "num_rows must be a multiple"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_argument_is_refused_by_name(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gradient_with_other_strides_gives_the_same_answer():
    gate_up = leaf(4, 16)
    grad = transposed(4, 8)
    (strided,) = torch.autograd.grad(swiglu(gate_up), gate_up, grad)
    (contiguous,) = torch.autograd.grad(swiglu(gate_up), gate_up, grad.contiguous())
    assert torch.equal(strided, contiguous)

    qkv, grad = leaf(2, 3, 3, 2, 32), transposed(2, 3, 3, 2, 32)
    (strided,) = torch.autograd.grad(qk_norm_rope(qkv * 1), qkv, grad)
    (contiguous,) = torch.autograd.grad(qk_norm_rope(qkv * 1), qkv, grad.contiguous())
    assert torch.equal(strided, contiguous)


def test_torch_compile_sees_through_every_operation():
    """One graph, without a break, with the same loss and gradients."""
    weight, bias, gamma = leaf(8, 6 * 32), leaf(8), torch.rand(8, requires_grad=True)
    inputs, angles = torch.randn(6, 8), torch.randn(3, 16)

    def step(inputs):
        qkv = (inputs @ weight).view(2, 3, 3, 2, 32)[..., :32]
        qkv = qk_norm_rope(qkv, angles)
        hidden = swiglu(qkv.flatten(2).flatten(0, 1)[:, :16].contiguous())
        stream, normed = residual_norm(stream=inputs, branch=hidden, branch_bias=bias, layer_scale=gamma, **rows)
        loss, _ = cosine_loss(normed, inputs)
        return loss + stream.square().mean()

    rows = {
        name: torch.ones(6) if name == "row_scale" else torch.randn(8)
        for name in ("row_scale", "norm_weight", "norm_bias")
    }
    rows |= {"norm_weight": torch.rand(8)}

    def run(function):
        weight.grad = bias.grad = gamma.grad = None
        loss = function(inputs)
        loss.backward()
        return [loss.detach(), weight.grad, bias.grad, gamma.grad]

    eager = run(step)
    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for expected, got in zip(eager, compiled, strict=True):
        torch.testing.assert_close(got, expected)
