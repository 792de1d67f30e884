"""Activation checkpointing: keep a function's arguments, compute again in the backward pass what it made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function`` and keep its arguments alone until the backward pass.

    The backward pass calls it again, up to the last tensor that it needs. A plain linear layer at the end needs its
    input, so that neither its product nor a collective behind it is repeated.

    Args:
        function: without random draws of its own.
        arguments: of the function, tensors and others.
    """
    # every draw of the model is an argument, so there is no random state to restore
    result: Result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def called(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function`` and keep what autograd keeps: the other choice beside :func:`recomputed`."""
    return function(*arguments)
