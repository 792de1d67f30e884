"""The references are the definitions: their gradients are checked against finite differences in fp64."""

import pytest
import torch
from torch.autograd import gradcheck

from megatron_nepa.kernels.attention.backends import attention_sdpa
from megatron_nepa.kernels.cosine_loss import reference
from megatron_nepa.kernels.cosine_loss.reference import cosine_loss_reference, loss_by_sample
from megatron_nepa.kernels.qk_norm_rope.reference import qk_norm_rope_reference
from megatron_nepa.kernels.residual_norm.reference import layer_norm_reference, residual_norm_reference
from megatron_nepa.kernels.swiglu.reference import swiglu_reference


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_swiglu():
    assert gradcheck(swiglu_reference, leaf(3, 8))


@pytest.mark.parametrize("affine", [False, True])
def test_qk_norm_rope(affine):
    weights = [leaf(4), leaf(4)] if affine else [None, None]
    angles, scale = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    assert gradcheck(
        lambda *args: qk_norm_rope_reference(*args, True, 1e-6), (leaf(2, 2, 3, 1, 4), angles, scale, *weights)
    )


def test_layer_norm():
    assert gradcheck(lambda *args: layer_norm_reference(*args, 1e-6), (leaf(3, 5), leaf(5), leaf(5)))


def test_residual_norm():
    row_scale = torch.rand(3, dtype=torch.float64)
    inputs = (leaf(3, 5), leaf(3, 5), leaf(5), leaf(5), row_scale, leaf(5), leaf(5))
    assert gradcheck(lambda *args: residual_norm_reference(*args, 1e-6), inputs)


@pytest.mark.parametrize("layout", [(1, 0, 3, 0, 6), (1, 0, 3, 1, 6), (0, 1, 3, 0, 6)])
def test_cosine_loss(layout):
    assert gradcheck(lambda *args: cosine_loss_reference(*args, *layout)[0], (leaf(5, 4), leaf(6, 4)))


@pytest.mark.parametrize("layout", [(1, 0, 3), (1, 1, 3), (0, 1, 3)])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_losses_of_samples_have_the_loss_as_their_mean(layout, rows, monkeypatch):
    """However many rows are taken at a time, and however they are cut between ranks, the last of which pads."""
    monkeypatch.setattr(reference, "_ROWS", rows)
    prediction, target = leaf(8, 4).detach(), leaf(9, 4).detach()
    parts = [(0, 4), (4, 8)]  # of 6 rows in two samples
    losses = sum(loss_by_sample(prediction[a:b], target[a : b + 1], *layout, a, 6) for a, b in parts)
    whole, _ = cosine_loss_reference(prediction, target, *layout, 0, 6)
    first, _ = cosine_loss_reference(prediction[:3], target[:4], *layout, 0, 3)
    torch.testing.assert_close(losses.mean(), whole)
    torch.testing.assert_close(losses[0], first)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    assert gradcheck(lambda qkv: attention_sdpa(qkv, causal), leaf(2, 3, 3, 2, 4))
