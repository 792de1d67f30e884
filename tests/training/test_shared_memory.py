"""A rank leaves nothing behind in the machine's shared memory."""

from pathlib import Path

from tests.distributed.cases import MODEL, Case, Grid, train_case
from tests.distributed.ranks import run_ranks


def names() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("deepspeed")}


def test_training_leaves_no_buffer_in_shared_memory() -> None:
    before = names()
    run_ranks(2, train_case, Case(Grid(data_size=2), MODEL, steps=1))
    assert names() <= before
