"""The one place where a run chooses its implementations of the fused operations."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_nepa.config import ConfigError, require
from megatron_nepa.kernels.attention.backends import attention_masked, attention_sdpa, choose_attention
from megatron_nepa.kernels.cosine_loss.operation import COSINE_LOSS
from megatron_nepa.kernels.operations import OPERATIONS
from megatron_nepa.kernels.qk_norm_rope.operation import QK_NORM_ROPE
from megatron_nepa.kernels.residual_norm.operation import RESIDUAL_NORM
from megatron_nepa.kernels.residual_norm.reference import layer_norm_reference
from megatron_nepa.kernels.swiglu.operation import SWIGLU

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The operations that a model is built from; each field's contract is its reference's docstring."""

    qk_norm_rope: Callable[..., Tensor] = QK_NORM_ROPE.reference
    swiglu: Callable[[Tensor], Tensor] = SWIGLU.reference
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm_reference
    residual_norm: Callable[..., tuple[Tensor, Tensor]] = RESIDUAL_NORM.reference
    cosine_loss: Callable[..., tuple[Tensor, Tensor]] = COSINE_LOSS.reference
    attention: Callable[[Tensor, bool], Tensor] = attention_sdpa
    attention_masked: Callable[[Tensor, Tensor], Tensor] = attention_masked

    def describe(self) -> dict[str, str]:
        """Operation name to the name of the function that serves it, for the log and config.json."""
        return {name: getattr(self, name).__name__ for name in self.__dataclass_fields__}


def select_kernels(
    choice: Literal["auto", "triton", "reference"],
    device: torch.device | str,
    *,
    attention_shape: tuple[int, int, int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    head_sizes: Collection[int] = (),
) -> Kernels:
    """The implementations that a run uses, chosen once at start-up.

    The backward pass of attention repeats bit for bit under ``torch.use_deterministic_algorithms``; the Triton kernels'
    always does.

    Args:
        choice: ``auto`` takes the Triton kernels on a CUDA device and plain torch elsewhere, in bf16 on a CPU a few
            rows at a time; ``triton`` and ``reference`` insist. ``reference`` also takes torch's SDPA for attention.
        device: where the run computes.
        attention_shape: (B, T, local heads, d) of the run's attention, on which a GPU's back-ends are timed once; None
            takes the first that is installed.
        dtype: dtype of the activations.
        causal: whether attention will be causal.
        head_sizes: widths of the heads that the run has besides.

    Raises:
        ConfigError: ``triton`` where it cannot run.
    """
    device = torch.device(device)
    if choice == "reference":
        return Kernels()
    deterministic = torch.are_deterministic_algorithms_enabled()
    attention = choose_attention(device, attention_shape, dtype, causal, deterministic)
    if choice == "auto" and not _triton_compiles_for(device):
        # in fp32 the references take no longer
        on_cpu = OPERATIONS if device.type == "cpu" and dtype == torch.bfloat16 else ()
        served = {operation.name: operation.on_cpu for operation in on_cpu if operation.on_cpu is not None}
        return Kernels(attention=attention, **served)
    sizes = {*head_sizes, *(() if attention_shape is None else attention_shape[3:])}
    return _triton_kernels(choice, device, sizes, attention)


def _triton_compiles_for(device: torch.device) -> bool:
    """Whether the kernels would run as machine code; in the interpreter they are for proofs alone."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from megatron_nepa.kernels.launching.interpreter import is_interpreting

    return not is_interpreting()


def _triton_kernels(
    choice: str,
    device: torch.device,
    head_sizes: set[int],
    attention: Callable[[Tensor, bool], Tensor],
) -> Kernels:
    require(
        importlib.util.find_spec("triton") is not None,
        "kernels is triton, but the package triton is not installed; install it or set kernels to reference.",
    )
    # imported here: the reference path must neither need Triton nor wait for it
    from megatron_nepa.kernels.launching.interpreter import is_interpreting, round_bf16_to_nearest

    if is_interpreting():
        round_bf16_to_nearest()
    elif device.type != "cuda":
        raise ConfigError(
            f"kernels is triton, but the run is on {device}; set kernels to reference, "
            "or TRITON_INTERPRET=1 in the environment to run the kernels, slowly, in Triton's interpreter."
        )
    from megatron_nepa.kernels.qk_norm_rope.fused import HEAD_DIMS

    kernels = replace(fused_kernels(), attention=attention)
    if device.type == "cuda":
        kernels = replace(kernels, layer_norm=_apex_layer_norm() or layer_norm_reference)
    unserved = sorted(head_sizes - set(HEAD_DIMS))
    if unserved:
        dims = ", ".join(map(str, HEAD_DIMS))
        problem = f"the kernel of QK-norm and RoPE takes head dims {dims}, not {unserved[0]}"
        require(choice == "auto", f"kernels is triton, but {problem}; set kernels to auto.")
        logger.warning("kernels: %s; plain torch does their work.", problem)
        kernels = replace(kernels, qk_norm_rope=QK_NORM_ROPE.reference)
    return kernels


def fused_kernels() -> Kernels:
    """The Triton kernels of all operations; on tensors without memory their meta implementations run."""
    return Kernels(**{operation.name: operation.fused() for operation in OPERATIONS})


def _apex_layer_norm() -> Callable[[Tensor, Tensor, Tensor, float], Tensor] | None:
    """NVIDIA Apex's fused LayerNorm of an fp32 stream with bf16 weights, or None without Apex."""
    try:  # the package "apex" of PyPI is another project, without this module
        importlib.import_module("fused_layer_norm_cuda")  # which an Apex built without CUDA extensions lacks
        from apex.normalization.fused_layer_norm import mixed_dtype_fused_layer_norm_affine
    except (ImportError, OSError):
        return None

    def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out: Tensor = mixed_dtype_fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps)
        return out

    return apex_layer_norm
