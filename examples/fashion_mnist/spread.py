"""How accuracies of several seeds are told: their mean and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def in_percent(mean: float, spread: float) -> str:
    """A mean and its standard deviation, shares of 1, as tables show them: "80.96 ± 0.17"."""
    return f"{100 * mean:.2f} ± {100 * spread:.2f}"
