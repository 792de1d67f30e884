"""Kernels run in Triton's interpreter here, with the rounding of a GPU."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _interpreted():
    # not imported above: Triton must not be imported before the suite's conftest has asked for its interpreter
    from megatron_nepa.kernels.launching.interpreter import is_interpreting, round_bf16_to_nearest

    if not is_interpreting():
        pytest.skip("TRITON_INTERPRET=0: kernels are compiled in this process")
    round_bf16_to_nearest()
    torch.manual_seed(0)
