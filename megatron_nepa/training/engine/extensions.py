"""DeepSpeed's C++ extensions, compiled once a node."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from megatron_nepa.checkpoint.format.agreement import on_all_ranks
from megatron_nepa.parallel.topology import Topology


def build_extensions(names: list[str], topology: Topology) -> str | None:
    """Have the first rank of each node compile what DeepSpeed will load, while the others wait; collective.

    The builds lie in TORCH_EXTENSIONS_DIR, which should be a folder of the node; where it is not set, in one under
    ~/.cache/torch_extensions for each Python environment. What is there already is only loaded.

    Args:
        names: of DeepSpeed's op builders, such as "FusedAdamBuilder"; one that this accelerator lacks is passed over.
        topology: this rank's place.

    Returns:
        Why one cannot be built on some node (no nvcc, one of another CUDA than torch's), the same on every rank; None
        where all are there.
    """
    # environments that share torch's default folder rebuild it in turns, at every start
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions" / environment))
    # the environment's own ninja, be it activated or not: what one version of ninja built, another builds anew
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))

    if not names:  # the same on every rank: nothing to wait for
        return None

    def build() -> str | None:
        if int(os.environ.get("LOCAL_RANK", "0")) != 0:
            return None
        from deepspeed.accelerator import get_accelerator

        for name in names:
            builder = get_accelerator().create_op_builder(name)
            try:
                if builder is not None:
                    builder.load(verbose=False)
            except Exception as error:  # of the compiler, of torch's and of DeepSpeed's own kinds
                return " ".join(str(error).split())[:200] or type(error).__name__
        return None

    return next((reason for reason in on_all_ranks(topology, build) if reason is not None), None)
