"""Settings of the whole suite."""

import os
import random
from collections.abc import Callable

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed decides at import

# no deadline: the machine may be busy; no database: a run depends on nothing but its seed
_QUICK = hypothesis.settings(derandomize=True, max_examples=60, deadline=None, database=None)
_THOROUGH = hypothesis.settings(max_examples=3000, deadline=None, database=None, print_blob=True)
_SEED = pytest.StashKey[int]()

Examples = Callable[[Callable[[], None]], None]


def pytest_configure(config: pytest.Config) -> None:
    """Run Triton's kernels in its interpreter, on the CPU, except for ``pytest -m gpu`` (``make test-gpu``)."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported
    config.stash[_SEED] = int(config.getoption("hypothesis_seed", None) or random.randrange(2**32))


@pytest.fixture(params=["quick", pytest.param("thorough", marks=pytest.mark.slow)])
def examples(request: pytest.FixtureRequest) -> Examples:
    """Runs a property, a function under ``hypothesis.given``, inside the test that asks for this fixture.

    In the default suite on some dozen examples, the same ones every time; as a slow test on thousands, drawn anew from
    a printed seed.
    """

    def run(holds: Callable[[], None]) -> None:
        if request.param == "quick":
            _QUICK(holds)()
        else:
            print(f"--hypothesis-seed={request.config.stash[_SEED]} repeats these examples")  # shown if they fail
            hypothesis.seed(request.config.stash[_SEED])(_THOROUGH(holds))()

    return run


# the tests' matrices are tiny, and the forked ranks share the cores with them
torch.set_num_threads(1)
