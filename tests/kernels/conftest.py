"""Kernels run in Triton's interpreter here, with the rounding of a GPU."""

import pytest
import torch

from megatron_nepa.kernels.interpreter import is_interpreting, round_bf16_to_nearest

round_bf16_to_nearest()


@pytest.fixture(autouse=True)
def _seed():
    if not is_interpreting():
        pytest.skip("TRITON_INTERPRET=0: kernels are compiled in this process")
    torch.manual_seed(0)
