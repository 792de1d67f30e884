"""Training with tensor and sequence parallelism through the Triton kernels equals one rank on the reference."""

from dataclasses import replace

import pytest

from megatron_nepa.kernels.dispatch import select_kernels
from tests.distributed.cases import MODEL, Case, differences, train_case
from tests.distributed.ranks import run_ranks

# heads of 32 channels, one a rank; a micro-batch of 1 cuts the sample's 17 rows in two, with padding and a halo row
CASE = Case(model=replace(MODEL, num_heads=2), steps=1, global_batch_size=2)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_sequence_parallel_triton_equals_serial_reference(micro_batch_size):
    grid = {"tensor_size": 2, "sequence_parallel": True, "micro_batch_size": micro_batch_size}
    found = run_ranks(2, train_case, CASE.on(**grid), None, select_kernels("triton", "cpu"))[0]
    serial = run_ranks(1, train_case, CASE.on(zero_stage=0, micro_batch_size=2))[0]
    assert differences(found, serial) == []
