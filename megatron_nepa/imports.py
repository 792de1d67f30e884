"""Imports at the start of a run, which are most of it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

# torch, triton and pydantic each look through the metadata of every installed package for extensions: devices other
# than CPU and CUDA, other compilers, other validators, of which no run has a use
_NO_EXTENSIONS = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "TRITON_BACKENDS_IN_TREE": "1",
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
}


@contextlib.contextmanager
def lasting_imports(package: str) -> Iterator[None]:
    """Import a large package, and others with it, inside this block: what they make is taken to stay for good.

    Python's search for garbage would go through all of it many times over while it grows, a second of a start, and
    again now and then in a run. It is left out of that search from now on, with whatever else exists at the end of the
    block; garbage from before the block is collected first. Nor do the packages look for extensions, unless the
    environment says so.

    Args:
        package: where it is imported already the block is like any other: what exists by then may not stay.
    """
    if package in sys.modules:
        yield
        return
    for name, value in _NO_EXTENSIONS.items():
        os.environ.setdefault(name, value)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
