"""Whether a difference is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from examples.fashion_mnist.spread import deviation

Verdict = Literal["holds", "within noise", "does not hold"]
CONFIDENCE = 0.95  # of a verdict by itself


@dataclass(frozen=True)
class Noise:
    """How far accuracies of one setting lie apart, measured on the baseline.

    Attributes:
        deviation: standard deviation over seeds, pooled over the settings that were trained with many of them.
        degrees_of_freedom: behind it.
    """

    deviation: float
    degrees_of_freedom: int

    def bound(self, first: Sequence[float], second: Sequence[float]) -> float:
        """The least difference of two means that is more than noise, by Student's t.

        Args:
            first: accuracies of one variant, a seed each.
            second: of the other.
        """
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom))
        # three seeds say too little about their own spread: the baseline's is the least that is assumed of either
        spreads = [max(self.deviation, deviation(values)) ** 2 / len(values) for values in (first, second)]
        return quantile * float(np.sqrt(sum(spreads)))


@dataclass(frozen=True)
class Finding:
    """What became of a claim: the difference of the means, the bound of noise, and the verdict."""

    difference: float
    bound: float
    verdict: Verdict

    def __str__(self) -> str:
        points = f"{100 * self.difference:+.2f} points, noise up to {100 * self.bound:.2f}"
        return f"**{self.verdict}** ({points})"


def pool(deviations: Sequence[float], num_seeds: int) -> Noise:
    """The noise of settings with ``num_seeds`` seeds each."""
    freedom = len(deviations) * max(1, num_seeds - 1)
    return Noise(float(np.sqrt(np.mean(np.square(deviations)))), freedom)


def compare(better: Sequence[float], worse: Sequence[float], noise: Noise, is_level: bool = False) -> Finding:
    """Whether what the paper finds better is better here, too.

    Args:
        better: accuracies of what the paper finds better, a seed each.
        worse: of the other.
        noise: of the baseline.
        is_level: the paper finds them level. That nothing is seen beyond noise is no proof of it: it never "holds".
    """
    difference = float(np.mean(better) - np.mean(worse))
    bound = noise.bound(better, worse)
    if abs(difference) <= bound:
        return Finding(difference, bound, "within noise")
    return Finding(difference, bound, "holds" if difference > 0 and not is_level else "does not hold")
