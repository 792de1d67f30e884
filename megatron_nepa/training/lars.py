"""LARS for linear probes, as MAE trains them (He et al. 2022; You et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterable

from timm.optim import Lars
from torch import nn

TRUST_COEFFICIENT = 0.001


def probe_optimizer(parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> Lars:
    """timm's LARS, set up to take MAE's steps: without weight decay.

    The rate of a matrix is scaled by ``0.001 |weight| / |gradient|``, or by 1 where either norm is 0. Biases and
    norms, of one dimension or none, take plain steps.

    Args:
        parameters: of the probe.
        lr: the rate; MAE's is 0.1 * batch size / 256.
        momentum: of the scaled gradients.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "always_adapt": True}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "always_adapt": False}
    return Lars([matrices, vectors], lr=lr, momentum=momentum, trust_coeff=TRUST_COEFFICIENT, eps=0.0)
