"""The fused operations: the list that dispatch, proofs, benchmarks, doctor and dry run iterate.

A new one is a folder beside this file (``reference.py``, ``fused.py`` and the record in ``operation.py``), its place
here, and a field of :class:`~megatron_nepa.kernels.dispatch.Kernels`. Attention is none of them: its back-ends are
other packages' (:mod:`~megatron_nepa.kernels.attention.backends`).
"""

from __future__ import annotations

from megatron_nepa.kernels.cosine_loss.operation import COSINE_LOSS
from megatron_nepa.kernels.qk_norm_rope.operation import QK_NORM_ROPE
from megatron_nepa.kernels.record import Operation
from megatron_nepa.kernels.residual_norm.operation import RESIDUAL_NORM
from megatron_nepa.kernels.swiglu.operation import SWIGLU

OPERATIONS: tuple[Operation, ...] = (QK_NORM_ROPE, SWIGLU, RESIDUAL_NORM, COSINE_LOSS)
