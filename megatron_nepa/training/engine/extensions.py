"""DeepSpeed's C++ extensions, compiled once a node."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_nepa.parallel.topology import Topology


def build_extensions(names: list[str], topology: Topology) -> None:
    """Have the first rank of each node compile what DeepSpeed will load, while the others wait; collective.

    The builds lie in TORCH_EXTENSIONS_DIR, which should be a folder of the node; where it is not set, in one under
    ~/.cache/torch_extensions for each Python environment. What is there already is only loaded.

    Args:
        names: of DeepSpeed's op builders, such as "FusedAdamBuilder"; one that this accelerator lacks is passed over.
        topology: this rank's place.
    """
    # environments that share torch's default folder rebuild it in turns, at every start
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions" / environment))
    # the environment's own ninja, be it activated or not: what one version of ninja built, another builds anew
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        from deepspeed.accelerator import get_accelerator

        for name in names:
            builder = get_accelerator().create_op_builder(name)
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)
    dist.barrier(topology.host_group)
