"""Attention of short bf16 sequences on a CPU, written as matrix products.

On sequences as long as an image's, torch's SDPA takes about three times the time of the products that it consists of,
taken for many heads at once (``tools/benchmark.py kernels`` shows both).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

MAX_TOKENS = 512  # whole matrices of scores: their bytes grow with the square of the tokens
SCORES_AT_ONCE = 2**21  # they stay in the cache from one operation to the next, and a call has enough to do
ROWS = 64  # a block of queries is a multiple: oneDNN's products of an odd number of rows and columns take longer


def attention_products(qkv: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention, like :func:`~megatron_nepa.kernels.attention.backends.attention_sdpa`.

    Scores and weights are rounded to the input's dtype; the softmax between them is fp32 inside. Only qkv is kept for
    the backward pass, which computes the weights again.

    Args:
        qkv: [B, T, 3, heads, d].
        causal: whether a token sees only itself and the tokens before it.

    Returns:
        [B, T, heads, d] in the input's dtype, contiguous.
    """
    return _forward_op(qkv, causal)


def _forward(qkv: Tensor, causal: bool) -> Tensor:
    batch, tokens, _, heads, size = qkv.shape
    out, mask = qkv.new_empty(batch, tokens, heads, size), _mask(qkv)
    samples = _samples_at_once(tokens, heads)
    for part, part_out in zip(qkv.split(samples), out.split(samples), strict=True):
        for start, stop, seen in _blocks(tokens, causal):
            q, k, v = _matrices(part[:, start:stop, 0]), _matrices(part[:, :seen, 1]), _matrices(part[:, :seen, 2])
            weights = _weights(q, k, mask[start:stop, :seen], causal)
            part_out[:, start:stop].copy_(_rows(torch.bmm(weights, v), heads))
    return out


def _backward(grad: Tensor, qkv: Tensor, causal: bool) -> Tensor:
    _, tokens, _, heads, size = qkv.shape
    result, mask, zero = qkv.new_empty(qkv.shape), _mask(qkv), qkv.new_zeros(())
    samples = _samples_at_once(tokens, heads)
    for part, part_grad, part_result in zip(
        qkv.split(samples), grad.split(samples), result.split(samples), strict=True
    ):
        # the last block first: it sees every key, so that it writes what the others add to
        for start, stop, seen in reversed(list(_blocks(tokens, causal))):
            q, k, v = _matrices(part[:, start:stop, 0]), _matrices(part[:, :seen, 1]), _matrices(part[:, :seen, 2])
            upstream = _matrices(part_grad[:, start:stop])
            weights = _weights(q, k, mask[start:stop, :seen], causal)
            v_grad = torch.bmm(weights.transpose(1, 2), upstream)
            weights_grad = torch.bmm(upstream, v.transpose(1, 2))
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            q_grad = torch.baddbmm(zero, scores_grad, k, beta=0, alpha=size**-0.5)
            k_grad = torch.baddbmm(zero, scores_grad.transpose(1, 2), q, beta=0, alpha=size**-0.5)
            part_result[:, start:stop, 0].copy_(_rows(q_grad, heads))
            for index, found in ((1, k_grad), (2, v_grad)):
                target = part_result[:, :seen, index]
                target.copy_(_rows(found, heads)) if stop == tokens else target.add_(_rows(found, heads))
    return result


def _blocks(tokens: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """First query, last query and number of keys of every block, of which causal ones skip a quarter of the products.

    More blocks would skip more, and their products, being smaller, take that time again.
    """
    middle = tokens // (2 * ROWS) * ROWS if causal else 0
    if middle:
        yield 0, middle, middle
    yield middle, tokens, tokens


def _samples_at_once(tokens: int, heads: int) -> int:
    return max(1, SCORES_AT_ONCE // (heads * tokens**2))


def _mask(qkv: Tensor) -> Tensor:
    """What causal scores get added, [T, T]."""
    tokens = qkv.shape[1]
    return torch.full((tokens, tokens), float("-inf"), dtype=qkv.dtype, device=qkv.device).triu(1)


def _matrices(x: Tensor) -> Tensor:
    """[B, n, heads, d] to [B heads, n, d], next to one another: torch copies any other before a product."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _rows(x: Tensor, heads: int) -> Tensor:
    """[B heads, n, d] to [B, n, heads, d]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Softmax of the scores; the product scales and masks them as it writes them."""
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), beta=float(causal), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1)


# custom ops: --compile takes them whole, where it would unroll the loops
_forward_op = library.custom_op("megatron_nepa::attention_products", _forward, mutates_args=())
_backward_op = library.custom_op("megatron_nepa::attention_products_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _forward_fake(qkv: Tensor, causal: bool) -> Tensor:
    batch, tokens, _, heads, size = qkv.shape
    return qkv.new_empty(batch, tokens, heads, size)


@_backward_op.register_fake
def _backward_fake(grad: Tensor, qkv: Tensor, causal: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    qkv, ctx.causal = inputs
    ctx.save_for_backward(qkv)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.causal), None


_forward_op.register_autograd(_autograd, setup_context=_setup_context)
