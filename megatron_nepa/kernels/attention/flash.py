"""flash-attn on packed qkv: its versions 2, 3 and 4 are three packages with three interfaces.

Version 2 (``flash_attn``) and 3 (``flash_attn_interface``, Hopper) take packed qkv: their backward writes its gradient
directly. Version 4 (``flash_attn.cute``, Hopper and Blackwell) takes q, k and v.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# qkv [B, T, 3, heads, d] and whether it is causal, to [B, T, heads, d]
Attention = Callable[[Tensor, bool], Tensor]


def newer_flash_attentions() -> list[Attention]:
    """Versions 3 and 4 of flash-attn, where they are installed and can be imported."""
    return [version for version in (flash_attention_3(), flash_attention_4()) if version is not None]


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


def flash_attention_2(deterministic: bool) -> Attention | None:
    """FlashAttention-2's packed interface (flash-attn 2.8), or None where it is not installed or broken.

    Args:
        deterministic: make backward repeat bit for bit, a little slower (forward always does).
    """
    try:
        packed = import_flash_attn()
    except ImportError as error:
        logger.warning("attention: %s; the other back-ends take its place.", error)
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


def flash_attention_3() -> Attention | None:
    """FlashAttention-3's packed interface, or None where it is not installed or broken."""
    packed = _function("flash_attn_interface", "flash_attn_qkvpacked_func")
    if packed is None:
        return None

    def flash_attn_3(qkv: Tensor, causal: bool) -> Tensor:
        return _output(packed(qkv, causal=causal))

    return flash_attn_3


def flash_attention_4() -> Attention | None:
    """FlashAttention-4, or None where it is not installed or broken."""
    function = _function("flash_attn.cute", "flash_attn_func")
    if function is None:
        return None

    @torch.compiler.disable  # it compiles itself, and --compile cannot look inside
    def flash_attn_4(qkv: Tensor, causal: bool) -> Tensor:
        return _output(function(*qkv.unbind(2), causal=causal))

    return flash_attn_4


def _function(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a package that may be absent, or present without what it needs itself, as in flash-attn 2.8's
    wheel the folder of version 4 is."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # libraries of another torch, a CUTLASS of another version: of every kind
        logger.debug("attention: %s cannot be used: %s", module, error)
        return None
    return function


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases return the log-sum-exp of each row besides."""
    return result[0] if isinstance(result, tuple) else result
