"""megatron_nepa: NEPA pre-training of causal Vision Transformers at scale.

Docstrings cite the method's paper ("paper", https://sihanxu.github.io/nepa) and its authors' code ("release",
https://github.com/SihanXU/nepa).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# OpenMP's waiting threads spin for milliseconds by default: on a CPU that is shared (by ranks, decoders, other users)
# that made a step several times slower. A short spin is about as fast on an idle one. Read when torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from megatron_nepa.library.loading import load


def __getattr__(name: str) -> Any:
    # torch is imported by the first use, so that --help and the launchers stay quick
    if name == "load":
        from megatron_nepa.library.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
