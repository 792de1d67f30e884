"""What a checkpoint holds, in words."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import stored_tensors
from megatron_nepa.config import ModelConfig


def describe(path: str | Path) -> str:
    """Progress, grid, tensors and model of a checkpoint, several lines; reads no tensor.

    Args:
        path: a checkpoint, or an OUTPUT_DIR for its newest one.

    Raises:
        ConfigError: where there is none, or a file is missing or of another size.
    """
    checkpoint = find_checkpoint(str(path))
    manifest = read_manifest(checkpoint)
    stored = stored_tensors(checkpoint)
    counts: dict[str, int] = {}
    for name, value in stored.items():
        kind = name.partition(".")[0]
        counts[kind] = counts.get(kind, 0) + value.numel()
    files = manifest["files"]
    lines = [str(checkpoint)]
    if manifest["has_optimizer"]:
        progress, run = manifest["progress"], manifest["run"]
        parallel = "with" if run["parallel"]["sequence_parallel"] else "without"
        lines += [
            f"  step {progress['step']}, {progress['samples']} samples, "
            f"{progress['step'] - progress['applied_steps']} steps skipped; recipe {run['recipe']}, seed {run['seed']}",
            f"  written by data parallel {manifest['data_parallel_size']} x tensor parallel "
            f"{manifest['tensor_parallel_size']} {parallel} sequence parallelism, ZeRO {manifest['zero_stage']}, "
            f"micro-batch {run['micro_batch_size']}, {run['dtype']}",
        ]
    else:
        lines.append(f"  weights only, for --init_from: {manifest['origin']}")
    elements = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    total = sum(facts["size"] for facts in files.values())
    lines.append(f"  {len(files)} files, {total / 1e9:.3g} GB, {len(stored)} tensors; elements: {elements}")
    model = manifest["run"]["model"]
    lines += [f"  model.{field.name} {model[field.name]}" for field in fields(ModelConfig)]
    return "\n".join(lines)
