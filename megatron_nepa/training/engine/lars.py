"""LARS for linear probes, as MAE trains them (He et al. 2022; You et al. 2017)."""

from __future__ import annotations

from typing import Any

from timm.optim import Lars

TRUST_COEFFICIENT = 0.001


def build_lars(groups: list[dict[str, Any]], momentum: float) -> Lars:
    """timm's LARS, set up to take MAE's steps.

    The rate of a matrix is scaled by ``0.001 |weight| / |gradient|``, or by 1 where either norm is 0. Biases and
    norms, of one dimension or none, take plain steps.

    Args:
        groups: parameter groups, each either of matrices or of vectors; the learning rate is set at every step.
        momentum: decay of the running sum of scaled gradients.
    """
    groups = [{**group, "always_adapt": group["params"][0].ndim > 1} for group in groups]
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=TRUST_COEFFICIENT, eps=0.0)
