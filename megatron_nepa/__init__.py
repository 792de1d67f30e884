"""megatron_nepa: NEPA pre-training of causal Vision Transformers at scale.

Docstrings cite the method's paper ("paper", https://sihanxu.github.io/nepa) and its authors' code ("release",
https://github.com/SihanXU/nepa).
"""

import os

# OpenMP's waiting threads spin for milliseconds by default: on a CPU that is shared (by ranks, decoders, other users)
# that made a step several times slower. A short spin is about as fast on an idle one. Read when torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
