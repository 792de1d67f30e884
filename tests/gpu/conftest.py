"""These tests need a GPU and kernels that are compiled, not interpreted: ``make test-gpu`` runs them on their own."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _compiled_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("other tests of this process run the kernels in the interpreter; run make test-gpu")
    torch.manual_seed(0)
