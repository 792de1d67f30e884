"""Attention on packed qkv: one call, several back-ends, of which the fastest on the run's own shape is taken.

They are torch's SDPA and the versions of flash-attn that are installed (:mod:`.flash`).
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_nepa.config import require
from megatron_nepa.kernels.attention.flash import (
    Attention,
    flash_attention_2,
    flash_attention_fits,
    newer_flash_attentions,
)
from megatron_nepa.kernels.attention.products import MAX_TOKENS, attention_products
from megatron_nepa.kernels.launching.timing import milliseconds

logger = logging.getLogger(__name__)

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attention_sdpa(qkv: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention through torch's SDPA.

    Args:
        qkv: [B, T, 3, heads, d].
        causal: whether a token sees only itself and the tokens before it.

    Returns:
        [B, T, heads, d] in the input's dtype, contiguous.
    """
    # unbound along the packing, so that backward stacks the gradients in qkv's own layout
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [B, heads, T, d]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).contiguous()


def attention_masked(qkv: Tensor, visible: Tensor) -> Tensor:
    """Attention under a mask of one's own, through torch's SDPA, which takes the back-end that serves a mask.

    flash-attn does not serve one: its causal kernels take a window, not a mask of every sample.

    Args:
        qkv: [B, T, 3, heads, d].
        visible: whether a query (third axis) sees a key (fourth), bool [B, 1, T, T]; every query sees one at least.

    Returns:
        [B, T, heads, d] in the input's dtype, contiguous.
    """
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [B, heads, T, d]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return out.transpose(1, 2).contiguous()


def sdpa_with(backend: SDPBackend) -> Attention:
    """``attention_sdpa`` that prefers ``backend`` and falls back on the others where it does not fit."""
    order = [backend, *(other for other in BACKENDS if other != backend)]

    def attention(qkv: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return attention_sdpa(qkv, causal)

    attention.__name__ = "sdpa_" + backend.name.removesuffix("_ATTENTION").lower()
    return attention


def attention_candidates(head_dim: int, dtype: torch.dtype, deterministic: bool) -> list[Attention]:
    """The back-ends that may serve a CUDA device, the one to take untimed first.

    Versions 3 and 4 of flash-attn come last: they serve where they were timed and checked. Deterministic runs leave out
    those and cuDNN, and torch's flash and efficient back-ends too unless
    ``torch.use_deterministic_algorithms`` is on, which is what makes those two repeat.
    """
    fits = flash_attention_fits(head_dim, dtype)
    flash = flash_attention_2(deterministic) if fits else None
    backends = list(BACKENDS)
    if deterministic:
        backends.remove(SDPBackend.CUDNN_ATTENTION)
        if not torch.are_deterministic_algorithms_enabled():
            backends = [SDPBackend.MATH]
    newer = newer_flash_attentions() if fits and not deterministic else []
    return ([] if flash is None else [flash]) + [sdpa_with(backend) for backend in backends] + newer


def choose_attention(
    device: torch.device,
    shape: tuple[int, int, int, int] | None,
    dtype: torch.dtype,
    causal: bool,
    deterministic: bool,
) -> Attention:
    """The attention of a run: on a GPU the fastest back-end, timed once; on a CPU SDPA, or products in bf16.

    A CPU's choice is not timed, so that a run which continues computes as before, bit for bit.

    Args:
        device: where the run computes.
        shape: (B, T, local heads, d) of the run; None takes the first candidate without timing.
        dtype: dtype of qkv.
        causal: whether the run's attention is causal.
        deterministic: whether backward must repeat bit for bit.

    Returns:
        The back-end; every rank of an initialised ``torch.distributed`` gets rank 0's choice.
    """
    if device.type != "cuda":
        short = shape is not None and shape[1] <= MAX_TOKENS
        return attention_products if short and dtype == torch.bfloat16 else attention_sdpa
    candidates = attention_candidates(64 if shape is None else shape[3], dtype, deterministic)
    if shape is None:
        return candidates[0]
    batch, tokens, heads, head_dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    return fastest_attention(candidates, qkv, causal)


def fastest_attention(candidates: list[Attention], qkv: Tensor, causal: bool) -> Attention:
    """Time forward and backward of each candidate on ``qkv``, a leaf that requires grad, and log the choice.

    A candidate that does not run here, or computes something else, is named and left out.

    Raises:
        ConfigError: no candidate is left.
    """
    times: dict[str, float] = {}
    for attention in candidates:

        def step(attention: Attention = attention) -> None:
            out = attention(qkv, causal)
            torch.autograd.grad(out, qkv, out.detach())

        try:
            error = largest_error(attention, qkv, causal)
            if error > _allowed_error(qkv.dtype):
                logger.warning(
                    "attention: %s is wrong here, by %.1g of the largest value; it is left out.",
                    attention.__name__,
                    error,
                )
                continue
            times[attention.__name__] = milliseconds(step, qkv.device)
        except Exception as error:  # packages refuse with assertions and compilers with kinds of their own, too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("attention: %s does not run here: %s", attention.__name__, reason)
    require(bool(times), f"no attention back-end runs on {qkv.device} with {qkv.dtype} and shape {list(qkv.shape)}.")
    chosen = [min(times, key=lambda name: times[name])]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)  # ranks that are close to a tie must not differ
    logger.info(
        "attention: %s; %s",
        chosen[0],
        ", ".join(f"{name} {duration:.3f} ms" for name, duration in times.items()),
    )
    return next(attention for attention in candidates if attention.__name__ == chosen[0])


def largest_error(attention: Attention, qkv: Tensor, causal: bool) -> float:
    """Largest error of the first sample's output or gradient, against fp64, over the largest value there; inf if nan.

    Args:
        attention: the back-end to check.
        qkv: [B, T, 3, heads, d].
        causal: whether a token sees only itself and the tokens before it.
    """
    sample = qkv.detach()[:1].clone().requires_grad_()
    exact = sample.detach().double().requires_grad_()
    out, expected = attention(sample, causal), attention_sdpa(exact, causal)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, sample, upstream)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    errors = [
        ((got.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max()).item()
        for got, wanted in ((out, expected), (grad, expected_grad))
    ]
    return float("inf") if any(math.isnan(error) for error in errors) else max(errors)


def _allowed_error(dtype: torch.dtype) -> float:
    """What rounding explains, several times over: a wrong mask, scale or gradient is far beyond it."""
    return max(8 * torch.finfo(dtype).eps, 0.01)
