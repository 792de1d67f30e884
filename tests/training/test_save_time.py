"""How long a save takes, and what the user hears of it beforehand."""

from __future__ import annotations

import torch
from torch import nn

from megatron_nepa.training.stopping.save_time import SaveTime, checkpoint_bytes


def test_bytes_of_masters_moments_and_average() -> None:
    model = nn.Linear(10, 4)  # 44 numbers
    assert checkpoint_bytes(model, 1, has_ema=True) == 44 * 16
    assert checkpoint_bytes(model, 1, has_ema=False) == 44 * 12
    model.bias.requires_grad = False  # a frozen parameter has neither moments nor an average
    assert checkpoint_bytes(model, 1, has_ema=True) == 40 * 16 + 4 * 4
    model.weight.tensor_model_parallel = True  # one of two parts
    assert checkpoint_bytes(model, 2, has_ema=True) == 80 * 16 + 4 * 4


def test_a_checkpoint_that_fits_into_the_grace_is_not_talked_about() -> None:
    save = SaveTime(4_800_000_000)
    assert save.seconds == 4.8
    assert save.warning() is None
    save.measured(20.0)
    assert save.warning(step_seconds=9.0) is None
    assert save.seconds == 20.0


def test_a_long_save_is_announced_once_before_the_first() -> None:
    save = SaveTime(112_000_000_000)
    text = save.warning()
    assert text is not None
    assert "112.0 GB saved in 112 s, at an assumed 1 GB/s" in text
    assert "--signal=USR1@284" in text
    save.measured(200.0)
    assert save.warning() is None


def test_a_measured_save_that_proves_long_is_announced() -> None:
    save = SaveTime(4_800_000_000)
    assert save.warning() is None
    save.measured(40.0)
    text = save.warning(step_seconds=2.0)
    assert text is not None
    assert "a stop takes about 42 s" in text
    assert "as the last one was" in text


def test_sizes_do_not_depend_on_the_dtype() -> None:
    assert checkpoint_bytes(nn.Linear(10, 4).to(torch.bfloat16), 1, has_ema=True) == 44 * 16
