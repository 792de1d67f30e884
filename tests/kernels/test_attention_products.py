"""Attention written as products: equal to SDPA, as exact in bf16, and keeping no more than qkv."""

import pytest
import torch
from torch import library

from megatron_nepa.kernels.attention.backends import attention_sdpa
from megatron_nepa.kernels.attention.products import MAX_TOKENS, attention_products
from megatron_nepa.kernels.dispatch import select_kernels

BF16 = torch.bfloat16


def output_and_gradient(attention, qkv, causal, upstream):
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, causal)
    (grad,) = torch.autograd.grad(out, qkv, upstream.to(qkv.dtype))
    assert out.is_contiguous()
    return out.detach(), grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(2, 1, 2), (2, 2, 2), (2, 63, 2), (3, 64, 2), (3, 133, 16)])
def test_products_equal_sdpa(causal, batch, tokens, heads):
    """With one block of queries or two, all samples at once or one after the other."""
    qkv = torch.randn(batch, tokens, 3, heads, 8).double()
    upstream = torch.randn(batch, tokens, heads, 8).double()
    found = output_and_gradient(attention_products, qkv, causal, upstream)
    torch.testing.assert_close(found, output_and_gradient(attention_sdpa, qkv, causal, upstream))


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_is_about_as_exact_as_sdpas(causal):
    """Rounding the scores must not cost more than the rounding that SDPA has as well."""
    torch.manual_seed(0)
    qkv, upstream = torch.randn(2, 257, 3, 4, 64).to(BF16), torch.randn(2, 257, 4, 64).to(BF16)
    exact = output_and_gradient(attention_sdpa, qkv.double(), causal, upstream)
    for found, sdpa, truth in zip(
        output_and_gradient(attention_products, qkv, causal, upstream),
        output_and_gradient(attention_sdpa, qkv, causal, upstream),
        exact,
        strict=True,
    ):
        assert (found - truth).norm() < 2 * (sdpa - truth).norm()
        assert (found - truth).norm() < 0.006 * truth.norm()


def test_compilers_see_the_operations_whole():
    qkv = torch.randn(2, 65, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    library.opcheck(torch.ops.megatron_nepa.attention_products.default, (qkv, True))


def test_only_qkv_is_kept():
    kept = []
    qkv = torch.randn(2, 33, 3, 2, 8, dtype=BF16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: qkv):
        attention_products(qkv, True)
    assert set(kept) <= {qkv.shape, torch.Size([0])}  # torch 2.8 keeps an empty tensor besides


def test_a_cpu_takes_products_for_short_bf16_sequences_alone():
    def choice(tokens, dtype, kernels="auto"):
        return select_kernels(kernels, "cpu", attention_shape=(2, tokens, 3, 64), dtype=dtype).attention

    assert choice(257, BF16) is attention_products
    assert choice(MAX_TOKENS + 1, BF16) is attention_sdpa
    assert choice(257, torch.float32) is attention_sdpa
    assert choice(257, BF16, "reference") is attention_sdpa
