"""Signs of life: say what a run waits for, where that takes long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

PATIENCE_SECONDS = 5.0


def _print(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def waiting_for(what: str, is_main: bool, say: Callable[[str], None] = _print) -> Iterator[None]:
    """Say on the main rank what is being done, once the block has taken 5 seconds.

    Args:
        what: such as "setting up DeepSpeed".
        is_main: whether this rank speaks.
        say: prints a line.
    """
    if not is_main:
        yield
        return
    timer = threading.Timer(PATIENCE_SECONDS, say, (f"{what} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
