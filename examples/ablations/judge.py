"""Whether a difference is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from examples.fashion_mnist.spread import deviation

Verdict = Literal["holds", "within noise", "does not hold"]
STANDARD_ERRORS = 2.0  # a difference beyond so many counts


def standard_error(first: Sequence[float], second: Sequence[float], noise: float) -> float:
    """Of the difference of two means.

    Args:
        first: accuracies of one variant, a seed each.
        second: of the other.
        noise: standard deviation of the baseline's seeds: three seeds say too little about their own spread, so that
            this is the least that is assumed of either.
    """
    spreads = [max(noise, deviation(values)) ** 2 / len(values) for values in (first, second)]
    return float(np.sqrt(sum(spreads)))


def level(first: Sequence[float], second: Sequence[float], noise: float) -> Verdict:
    """Whether what the paper finds level is level here, too."""
    return "holds" if compare(first, second, noise) == "within noise" else "does not hold"


def compare(better: Sequence[float], worse: Sequence[float], noise: float) -> Verdict:
    """Whether what the paper finds better is better here, too."""
    difference = float(np.mean(better) - np.mean(worse))
    bound = STANDARD_ERRORS * standard_error(better, worse, noise)
    if abs(difference) <= bound:
        return "within noise"
    return "holds" if difference > 0 else "does not hold"
