"""Learning-rate schedule: linear warm-up, then a cosine (paper table 4)."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float) -> float:
    """Learning rate of one optimizer step, a pure function of the step.

    With a warm-up of W >= 1 steps this is Hugging Face's ``get_cosine_schedule_with_warmup`` of a run one step longer,
    read one step later: that one gives its first step a learning rate of 0, this one gives step 0 ``peak / W`` and step
    W - 1 ``peak``. Without a warm-up step 0 has ``peak``. The cosine would reach ``minimum`` one step after the last,
    so that no step is spent at a learning rate of 0.

    Args:
        step: steps completed before this one, 0 to ``total_steps - 1``; later ones have ``minimum``.
        total_steps: steps of the whole run.
        warmup_steps: W, steps of the linear warm-up; 0 for none.
        peak: largest learning rate.
        minimum: learning rate at the end of the cosine.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    peak_step = max(warmup_steps - 1, 0)
    progress = (step - peak_step) / max(total_steps - peak_step, 1)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
