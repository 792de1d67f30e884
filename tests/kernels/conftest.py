"""Kernels run in Triton's interpreter here: it must be asked for before the first kernel is defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from megatron_nepa.kernels.interpreter import round_bf16_to_nearest

round_bf16_to_nearest()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
