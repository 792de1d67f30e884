"""Every fused kernel, forward and backward, against fp64 by the rule of ``kernel_rule``."""

import pytest
import torch

from megatron_nepa.kernels.cosine_loss.fused import cosine_loss_triton
from megatron_nepa.kernels.cosine_loss.reference import cosine_loss_reference
from megatron_nepa.kernels.qk_norm_rope.fused import qk_norm_rope_triton
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
from megatron_nepa.kernels.residual_norm.fused import residual_norm_triton
from megatron_nepa.kernels.residual_norm.reference import residual_norm_reference
from megatron_nepa.kernels.swiglu.fused import swiglu_triton
from megatron_nepa.kernels.swiglu.reference import swiglu_reference
from tests.kernels.kernel_rule import assert_rule

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-12


def not_a_leaf(function):
    """In-place operations take the output of another operation, as in the model."""
    return lambda qkv, **others: function(qkv * 1, **others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (5, 64), (2, 1032)])
def test_swiglu(rows, width, dtype):
    tensors = {"gate_up": torch.randn(rows, 2 * width).to(dtype)}
    assert_rule(swiglu_triton, swiglu_reference, tensors, ["gate_up"], [torch.randn(rows, width).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dim"),
    [(1, 1, 1, 32), (2, 5, 3, 64), (1, 2, 5, 80), (1, 2, 33, 96), (2, 2, 2, 128)],
)
def test_qk_norm_rope(batch, tokens, heads, dim, norm, dtype):
    angles = torch.randn(tokens, dim // 2) * 4
    angles[0] = 0  # BOS
    weights = {name: torch.randn(dim).to(dtype) if norm == "affine" else None for name in ("q_weight", "k_weight")}
    tensors = {
        "qkv": torch.randn(batch, tokens, 3, heads, dim).to(dtype),
        "angles": angles,
        "scale": torch.rand(batch) + 0.5,
        **weights,
        "norm": norm != "none",
        "eps": EPS,
    }
    upstream = [torch.randn(batch, tokens, 3, heads, dim).to(dtype)]
    differentiable = ["qkv"] + [name for name, weight in weights.items() if weight is not None]
    assert_rule(not_a_leaf(qk_norm_rope_triton), qk_norm_rope_reference, tensors, differentiable, upstream)


def test_qk_norm_rope_of_the_releases_prime_sequence():
    test_qk_norm_rope(1, 257, 1, 32, "plain", torch.bfloat16)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_with_angles_of_every_sample(dtype, affine):
    """Samples of which other patches are seen; 3 samples of 5 tokens, so that no stride divides another."""
    tensors = {
        "qkv": torch.randn(3, 5, 3, 2, 32).to(dtype),
        "angles": torch.randn(3, 5, 16) * 4,
        "scale": torch.rand(3) + 0.5,
        "q_weight": torch.randn(32).to(dtype) if affine else None,
        "k_weight": torch.randn(32).to(dtype) if affine else None,
        "norm": True,
        "eps": EPS,
    }
    upstream = [torch.randn(3, 5, 3, 2, 32).to(dtype)]
    differentiable = ["qkv", "q_weight", "k_weight"] if affine else ["qkv"]
    assert_rule(not_a_leaf(qk_norm_rope_triton), qk_norm_rope_reference, tensors, differentiable, upstream)


@pytest.mark.parametrize("rotate", [False, True])
def test_qk_norm_rope_without_rescale_or_rotation(rotate):
    tensors = {
        "qkv": torch.randn(2, 3, 3, 2, 32),
        "angles": torch.randn(3, 16) if rotate else None,
        "scale": None,
        "q_weight": None,
        "k_weight": None,
        "norm": True,
        "eps": EPS,
    }
    upstream = [torch.randn(2, 3, 3, 2, 32)]
    assert_rule(not_a_leaf(qk_norm_rope_triton), qk_norm_rope_reference, tensors, ["qkv"], upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_weights_that_the_output_cannot_be_divided_by(dtype):
    """A weight of 0 hides its channel, 1e-4 magnifies the output's rounding, a negative one flips it."""
    weight = torch.randn(32)
    weight[:8], weight[8:16], weight[16:24] = 0.0, 1e-4, -1.0
    tensors = {
        "qkv": torch.randn(2, 20, 3, 2, 32).to(dtype),
        "angles": torch.randn(20, 16),
        "scale": None,
        "q_weight": weight.to(dtype),
        "k_weight": weight.flip(0).to(dtype),
        "norm": True,
        "eps": EPS,
    }
    upstream = [torch.randn(2, 20, 3, 2, 32).to(dtype)]
    differentiable = ["qkv", "q_weight", "k_weight"]
    assert_rule(not_a_leaf(qk_norm_rope_triton), qk_norm_rope_reference, tensors, differentiable, upstream)


@pytest.mark.parametrize("dtypes", [DTYPES[:1] * 2, DTYPES, DTYPES[1:] * 2], ids=["fp32", "fp32 stream", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 33), (37, 48), (3, 768)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_residual_norm(rows, width, scaled, dropped, dtypes):
    stream_dtype, dtype = dtypes
    tensors = {
        "stream": torch.randn(rows, width).to(stream_dtype),
        "branch": torch.randn(rows, width).to(dtype),
        "branch_bias": torch.randn(width).to(dtype),
        "layer_scale": (0.3 + 0.4 * torch.rand(width)).to(dtype) if scaled else None,
        "row_scale": (torch.rand(rows) > 0.3) / 0.7 if dropped else None,
        "norm_weight": torch.randn(width).to(dtype),
        "norm_bias": torch.randn(width).to(dtype),
        "eps": EPS,
    }
    differentiable = [name for name, tensor in tensors.items() if torch.is_tensor(tensor) and name != "row_scale"]
    upstream = [torch.randn(rows, width).to(stream_dtype), torch.randn(rows, width).to(dtype)]
    assert_rule(residual_norm_triton, residual_norm_reference, tensors, differentiable, upstream)


@pytest.mark.parametrize("used", [0, 1])
def test_residual_norm_with_one_output_unused(used):
    """The last seam's stream goes nowhere, and a stream may be read without its norm."""
    tensors = {
        "stream": torch.randn(5, 16),
        "branch": torch.randn(5, 16),
        "branch_bias": torch.randn(16),
        "layer_scale": torch.rand(16),
        "row_scale": None,
        "norm_weight": torch.randn(16),
        "norm_bias": torch.randn(16),
        "eps": EPS,
    }
    differentiable = ["stream", "branch", "branch_bias", "layer_scale"] + ["norm_weight", "norm_bias"] * used
    assert_rule(
        lambda **kwargs: residual_norm_triton(**kwargs)[used],
        lambda **kwargs: residual_norm_reference(**kwargs)[used],
        tensors,
        differentiable,
        [torch.randn(5, 16)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "target_rows", "width", "layout"),
    [
        (34, 34, 48, (1, 0, 17, 0, 34)),  # two samples
        (10, 11, 33, (1, 0, 17, 7, 34)),  # a rank's rows cut both samples: halo row
        (20, 20, 768, (1, 0, 17, 17, 34)),  # three rows of padding
        (9, 9, 16, (0, 1, 3, 0, 9)),  # each patch predicts itself, BOS predicts nothing
        (2, 2, 8, (1, 0, 2, 0, 2)),  # one pair
        (257, 257, 8, (1, 0, 257, 0, 257)),
    ],
)
def test_cosine_loss(rows, target_rows, width, layout, dtype):
    shift, skip, period, first_row, num_rows = layout
    tensors = {
        "prediction": torch.randn(rows, width).to(dtype),
        "target": torch.randn(target_rows, width).to(dtype),
        "shift": shift,
        "skip": skip,
        "period": period,
        "first_row": first_row,
        "num_rows": num_rows,
    }
    upstream = [torch.tensor(0.25)]  # the engine scales the loss by 1 / accumulation
    assert_rule(cosine_loss_triton, cosine_loss_reference, tensors, ["prediction"], upstream, scale=1.0)


class _Off(torch.autograd.Function):
    """The same values, a gradient that is off by a share."""

    @staticmethod
    def forward(ctx, prediction, share):
        ctx.share = share
        return prediction.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + ctx.share), None


@pytest.mark.parametrize("share", [-1.0, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_sees_a_loss_whose_small_gradient_is_off(dtype, share):
    tensors = {"prediction": torch.randn(257, 64).to(dtype), "target": torch.randn(257, 64).to(dtype)}

    def loss(prediction, target):
        return cosine_loss_reference(prediction, target, 1, 0, 257, 0, 257)

    def off(prediction, target):
        return loss(_Off.apply(prediction, share), target)

    assert_rule(loss, loss, tensors, ["prediction"], [torch.tensor(0.25)], scale=1.0)
    with pytest.raises(AssertionError, match="prediction: error"):
        assert_rule(off, loss, tensors, ["prediction"], [torch.tensor(0.25)], scale=1.0)


def test_cosine_loss_of_zero_rows_is_finite_and_padding_gets_no_gradient():
    prediction = torch.randn(6, 8)
    prediction[1] = 0.0
    prediction.requires_grad_()
    target = torch.randn(6, 8)
    target[3] = 0.0
    loss, _ = cosine_loss_triton(prediction, target, 1, 0, 4, 0, 4)
    loss.backward()
    expected = prediction.detach().clone().requires_grad_()
    expected_loss, _ = cosine_loss_reference(expected, target, 1, 0, 4, 0, 4)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(prediction.grad, expected.grad)
    assert prediction.grad[3:].count_nonzero() == 0


def test_cosine_loss_hands_a_target_with_gradient_to_the_reference():
    prediction, target = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    loss, _ = cosine_loss_triton(prediction, target, 1, 0, 4, 0, 4)
    loss.backward()
    assert target.grad[1:].count_nonzero() == 24
    assert target.grad[0].count_nonzero() == 0


def test_parameter_gradients_repeat_bit_for_bit():
    def gradients():
        torch.manual_seed(1)
        tensors = [torch.randn(70, 48), torch.randn(70, 48), *(torch.randn(48) for _ in range(4))]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        stream, branch, bias, scale, weight, norm_bias = tensors
        outputs = residual_norm_triton(stream, branch, bias, scale, None, weight, norm_bias, EPS)
        (outputs[0].sin().sum() + outputs[1].cos().sum()).backward()
        return [tensor.grad for tensor in tensors]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)
