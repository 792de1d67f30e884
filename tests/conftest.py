"""Settings of the whole suite."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed decides at import


def pytest_configure(config: pytest.Config) -> None:
    """Run Triton's kernels in its interpreter, on the CPU, except for ``pytest -m gpu`` (``make test-gpu``)."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported


# the tests' matrices are tiny, and the forked ranks share the cores with them
torch.set_num_threads(1)
