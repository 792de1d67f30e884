"""Operations a few rows at a time, as bf16 has them on a CPU: the references' bits, forward and backward."""

import pytest
import torch

from megatron_nepa.kernels.qk_norm_rope import cpu as rope
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
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


def test_compilers_get_what_they_can_join():
    for function, shape, rest in (
        (rope.qk_norm_rope_cpu, (2, 4, 3, 2, 8), (torch.rand(4, 4), None, None, None, True, 1e-5)),
        (swiglu.swiglu_cpu, (4, 16), ()),
    ):
        torch._dynamo.reset()
        x = torch.randn(shape).to(BF16).requires_grad_()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, *rest), function(x, *rest))
