"""megatron_nepa: NEPA pre-training of causal Vision Transformers at scale."""

import os

# Threads that wait for each other must sleep, not spin: on a CPU that is shared (by ranks, decoders, other users)
# spinning made a training step several times slower. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
