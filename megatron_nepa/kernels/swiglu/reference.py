"""SwiGLU on the packed output of the fused gate-and-up projection (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: [N, 2F], gate in the first F columns.

    Returns:
        [N, F] in the input's dtype; computed in fp32 and rounded once.
    """
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
