"""Operations a few rows at a time, as bf16 has them on a CPU: the references' bits, forward and backward."""

import pytest
import torch

from megatron_nepa.kernels.qk_norm_rope import cpu as rope
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
from megatron_nepa.kernels.residual_norm import cpu as seam
from megatron_nepa.kernels.residual_norm.reference import residual_norm_reference
from megatron_nepa.kernels.swiglu import cpu as swiglu
from megatron_nepa.kernels.swiglu.reference import swiglu_reference

BF16 = torch.bfloat16
BATCH, TOKENS, HEADS, SIZE = 5, 7, 3, 8


def output_and_gradients(function, *arguments):
    arguments = [
        part.detach().clone().requires_grad_() if torch.is_tensor(part) and part.dtype == BF16 else part
        for part in arguments
    ]
    out = function(*arguments)
    torch.manual_seed(1)
    leaves = [part for part in arguments if torch.is_tensor(part) and part.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))]


@pytest.fixture(params=[1, 2, 100], ids="{} at once".format)
def at_once(request, monkeypatch):
    """One sample or row at a time, two, of which the last part has one, or all."""
    monkeypatch.setattr(rope, "CACHED_BYTES", request.param * TOKENS * HEADS * SIZE * 4)
    monkeypatch.setattr(seam, "CACHED_BYTES", request.param * 32 * 4)
    monkeypatch.setattr(swiglu, "CACHED_BYTES", request.param * 32 * 4)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("turn", ["none", "tokens", "rescaled", "samples"])
def test_qk_norm_and_rope_are_the_references(turn, norm):
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, SIZE).to(BF16)
    angles = {"none": None, "samples": torch.rand(BATCH, TOKENS, SIZE // 2)}.get(turn, torch.rand(TOKENS, SIZE // 2))
    scale = torch.rand(BATCH) + 0.5 if turn == "rescaled" else None
    arguments = (qkv, angles, scale, None, None, norm, 1e-5)
    found = output_and_gradients(rope.qk_norm_rope_cpu, *arguments)
    for ours, theirs in zip(found, output_and_gradients(qk_norm_rope_reference, *arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("at_once")
def test_weights_of_the_norms_get_their_gradients():
    """Summed over the parts, so in another order."""
    torch.manual_seed(0)
    qkv, weights = torch.randn(BATCH, TOKENS, 3, HEADS, SIZE).to(BF16), torch.rand(2, SIZE).to(BF16)
    arguments = (qkv, torch.rand(TOKENS, SIZE // 2), None, *weights, True, 1e-5)
    found = output_and_gradients(rope.qk_norm_rope_cpu, *arguments)
    wanted = output_and_gradients(qk_norm_rope_reference, *arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:2], wanted[:2], strict=True))
    for ours, theirs in zip(found[2:], wanted[2:], strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


@pytest.mark.usefixtures("at_once")
def test_swiglu_is_the_reference():
    torch.manual_seed(0)
    gate_up = torch.randn(9, 32).to(BF16)
    found = output_and_gradients(swiglu.swiglu_cpu, gate_up)
    for ours, theirs in zip(found, output_and_gradients(swiglu_reference, gate_up), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("row_scale", [True, False])
def test_the_seam_is_the_references(layer_scale, row_scale):
    """But for the gradients of bias, LayerScale and norm, which are summed over the parts."""
    torch.manual_seed(0)
    (stream, branch), vectors = torch.randn(2, 9, 32), torch.randn(4, 32).to(BF16)
    inputs = [stream, branch.to(BF16), vectors[0], vectors[1] if layer_scale else None, *vectors[2:]]
    inputs = [None if each is None else each.detach().requires_grad_() for each in inputs]
    leaves = [each for each in inputs if each is not None]
    rows = torch.rand(9) if row_scale else None
    upstream = torch.randn(9, 32), torch.randn(9, 32).to(BF16)
    found, wanted = [], []
    for function, results in ((seam.residual_norm_cpu, found), (residual_norm_reference, wanted)):
        outputs = function(*inputs[:4], rows, *inputs[4:], 1e-5)
        results += [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    for ours, theirs in zip(found[:4], wanted[:4], strict=True):  # stream, its norm, gradients of stream and branch
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found[4:], wanted[4:], strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


def test_compilers_get_what_they_can_join():
    for function, shape, rest in (
        (rope.qk_norm_rope_cpu, (2, 4, 3, 2, 8), (torch.rand(4, 4), None, None, None, True, 1e-5)),
        (swiglu.swiglu_cpu, (4, 16), ()),
    ):
        torch._dynamo.reset()
        x = torch.randn(shape).to(BF16).requires_grad_()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, *rest), function(x, *rest))
