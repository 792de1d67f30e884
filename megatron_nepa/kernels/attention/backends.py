"""Attention on packed qkv: one call, several back-ends.

FlashAttention-2 through flash-attn's packed interface where that package is installed (its backward writes the gradient
of packed qkv directly), else torch's SDPA with the back-end that is fastest on the run's own shape.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_nepa.config import require
from megatron_nepa.kernels.attention.products import MAX_TOKENS, attention_products
from megatron_nepa.kernels.launching.timing import milliseconds

logger = logging.getLogger(__name__)

Attention = Callable[[Tensor, bool], Tensor]
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


def sdpa_with(backend: SDPBackend) -> Attention:
    """``attention_sdpa`` that prefers ``backend`` and falls back on the others where it does not fit."""
    order = [backend, *(other for other in BACKENDS if other != backend)]

    def attention(qkv: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return attention_sdpa(qkv, causal)

    attention.__name__ = "sdpa_" + backend.name.removesuffix("_ATTENTION").lower()
    return attention


def import_flash_attn() -> Callable[..., Tensor] | None:
    """The packed function of flash-attn 2.8, or None where no package of that name is installed.

    Raises:
        ImportError: the package is there and cannot serve: flash-attn-4 alone, which has its name and not the function,
            or a build for another torch.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        packed: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_qkvpacked_func
    except (ImportError, OSError, AttributeError) as error:  # OSError: a library with undefined symbols
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(f"flash_attn is installed but cannot be used ({reason})") from error
    return packed


def flash_attention(deterministic: bool) -> Attention | None:
    """FlashAttention-2's packed interface (flash-attn 2.8), or None where it is not installed or broken.

    Args:
        deterministic: make backward repeat bit for bit, a little slower (forward always does).
    """
    try:
        packed = import_flash_attn()
    except ImportError as error:
        logger.warning("attention: %s; torch's SDPA takes its place.", error)
        return None
    if packed is None:
        return None

    def flash_attn(qkv: Tensor, causal: bool) -> Tensor:
        out: Tensor = packed(qkv, causal=causal, deterministic=deterministic)
        return out

    return flash_attn


def flash_attention_fits(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlashAttention-2 takes this head dim and dtype."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 8 == 0


def attention_candidates(head_dim: int, dtype: torch.dtype, deterministic: bool) -> list[Attention]:
    """The back-ends that may serve a CUDA device, the one to take untimed first.

    Deterministic runs leave out cuDNN, and torch's flash and efficient back-ends too unless
    ``torch.use_deterministic_algorithms`` is on, which is what makes those two repeat.
    """
    flash = flash_attention(deterministic) if flash_attention_fits(head_dim, dtype) else None
    backends = list(BACKENDS)
    if deterministic:
        backends.remove(SDPBackend.CUDNN_ATTENTION)
        if not torch.are_deterministic_algorithms_enabled():
            backends = [SDPBackend.MATH]
    return ([] if flash is None else [flash]) + [sdpa_with(backend) for backend in backends]


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

    Raises:
        ConfigError: no candidate ran.
    """
    times: dict[str, float] = {}
    for attention in candidates:

        def step(attention: Attention = attention) -> None:
            out = attention(qkv, causal)
            torch.autograd.grad(out, qkv, out.detach())

        try:
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
