"""The one place where a run chooses its implementations of the fused operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_nepa.kernels.attention import attention_sdpa
from megatron_nepa.kernels.cosine_loss import cosine_loss_reference
from megatron_nepa.kernels.qk_norm_rope import qk_norm_rope_reference
from megatron_nepa.kernels.residual_norm import layer_norm_reference, residual_norm_reference
from megatron_nepa.kernels.swiglu import swiglu_reference


@dataclass(frozen=True)
class Kernels:
    """The operations that a model is built from; each field's contract is its reference's docstring."""

    qk_norm_rope: Callable[..., Tensor] = qk_norm_rope_reference
    swiglu: Callable[[Tensor], Tensor] = swiglu_reference
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm_reference
    residual_norm: Callable[..., tuple[Tensor, Tensor]] = residual_norm_reference
    cosine_loss: Callable[..., tuple[Tensor, Tensor]] = cosine_loss_reference
    attention: Callable[[Tensor, bool], Tensor] = attention_sdpa

    def describe(self) -> dict[str, str]:
        """Operation name to the name of the function that serves it, for the log and config.json."""
        return {name: getattr(self, name).__name__ for name in self.__dataclass_fields__}
