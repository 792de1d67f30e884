"""Learning-rate schedule: linear warm-up, then a fall to a minimum (paper tables 4 and 5).

A function of the step alone, not one of torch's schedulers: these keep a state that a checkpoint would have to hold.
"""

from __future__ import annotations

import math

from megatron_nepa.config import Decay


def warmup_decay(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    minimum: float,
    shape: Decay = "cosine",
) -> float:
    """Learning rate of one optimizer step, a pure function of the step.

    With a warm-up of W >= 1 steps and a cosine this is Hugging Face's ``get_cosine_schedule_with_warmup`` of a run one
    step longer, read one step later: that one gives its first step a learning rate of 0, this one gives step 0
    ``peak / W`` and step W - 1 ``peak``. Without a warm-up step 0 has ``peak``. The fall would reach ``minimum`` one
    step after the last, so that no step is spent at a learning rate of 0.

    Args:
        step: steps completed before this one, 0 to ``total_steps - 1``; later ones have ``minimum``.
        total_steps: steps of the whole run.
        warmup_steps: W, steps of the linear warm-up; 0 for none.
        peak: largest learning rate.
        minimum: learning rate at the end of the fall.
        shape: of the fall; linear is mmsegmentation's polynomial of power 1.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    peak_step = max(warmup_steps - 1, 0)
    progress = min((step - peak_step) / max(total_steps - peak_step, 1), 1.0)
    remaining = 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * remaining
