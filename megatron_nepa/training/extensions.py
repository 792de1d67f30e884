"""DeepSpeed's C++ extensions, compiled once a node."""

from __future__ import annotations

import os

import torch.distributed as dist

from megatron_nepa.parallel.topology import Topology


def build_extensions(names: list[str], topology: Topology) -> None:
    """Have the first rank of each node compile what DeepSpeed will load, while the others wait; collective.

    The builds lie in TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions where it is not set), which should be a folder of
    the node. What is there already is only loaded.

    Args:
        names: of DeepSpeed's op builders, such as "FusedAdamBuilder"; one that this accelerator lacks is passed over.
        topology: this rank's place.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        from deepspeed.accelerator import get_accelerator

        for name in names:
            builder = get_accelerator().create_op_builder(name)
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)
    dist.barrier(topology.host_group)
