"""How the command line calls the fields of a config."""

from __future__ import annotations

# the fields that people set most are flags of one word, spelled as in DeepSpeed and Megatron
SHORT_NAMES = {
    "data.path": "data",
    "evaluation.data": "validation_data",
    "evaluation.only": "evaluate_only",
    "probe.every": "probe_every",
    "probe.data": "probe_data",
    "probe.validation_data": "probe_validation_data",
    "trunk.path": "trunk",
    "data.on_bad_image": "on_bad_image",
    "optimizer.base_lr": "base_lr",
    "parallel.tensor_parallel_size": "tensor_parallel_size",
    "parallel.sequence_parallel": "sequence_parallel",
    "parallel.activation_checkpointing": "activation_checkpointing",
}

# flags of older versions, and what each is called now
RENAMED = {"--trunk.dtype": "--dtype"}


def flag_of(name: str) -> str:
    """The flag of a field that is named as "field" or "section.field"."""
    return f"--{SHORT_NAMES.get(name, name)}"
