"""Evaluating a model: its raw weights and their average, while it is trained or alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.masters import Masters
from megatron_nepa.checkpoint.resume import find_checkpoint
from megatron_nepa.checkpoint.state import TrainState
from megatron_nepa.checkpoint.store import CheckpointStore
from megatron_nepa.config import RunConfig
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine import TrainingEngine
from megatron_nepa.training.task import Evaluator, Task


def evaluate_engine(
    engine: TrainingEngine, evaluator: Evaluator, interrupted: Callable[[], bool]
) -> dict[str, float] | None:
    """Evaluate the raw weights and, where the engine keeps one, their average; every rank calls it.

    Returns:
        Results as the log names them ("val_top1" of the raw weights, "val_ema_top1" of the average); None where the
        evaluation was interrupted.
    """
    results: dict[str, float] = {}
    weights: list[tuple[str, contextlib.AbstractContextManager[None]]] = [("", contextlib.nullcontext())]
    if engine.ema is not None:
        weights.append(("ema_", engine.averaged_weights()))
    for kind, chosen in weights:
        with chosen, evaluation_mode(engine.module):
            found = evaluator.evaluate(engine.module, interrupted)
        if found is None:
            return None
        results |= {f"{evaluator.prefix}{kind}{name}": value for name, value in found.items()}
    return results


def best_metric(evaluator: Evaluator, has_ema: bool) -> str | None:
    """The name in the log of the result by which the best checkpoint is kept: the average's where there is one."""
    return None if evaluator.best is None else f"{evaluator.prefix}{'ema_' if has_ema else ''}{evaluator.best}"


def evaluate_only(run: RunConfig, task: Task, kernels: Kernels, topology: Topology) -> dict[str, float]:
    """Evaluate a checkpoint without training; every rank calls it.

    The weights are those of ``run.init_from`` (any checkpoint, the release's included), or else of the best or newest
    checkpoint in ``run.output_dir``. The results go to ``evaluation.json`` there and to the console.

    Raises:
        ConfigError: where there is no checkpoint, or it does not fit the model.
    """
    evaluator = task.evaluator
    assert evaluator is not None
    output_dir = Path(run.output_dir)
    source = run.init_from
    if source is None:
        store = CheckpointStore(output_dir / "checkpoints", run.keep_last)
        source = str(store.best() or find_checkpoint(run.output_dir))
    model = task.build_model(kernels).to(topology.device, DTYPES[run.dtype])
    # no optimizer: the weights are the model's own parameters
    bare = TrainState(model, Masters(torch.optim.AdamW(model.parameters()), [], {}), None, topology)
    origin = start_from(bare, source, run.init_weights, run.model, require_head=True)
    with evaluation_mode(model):
        results = evaluator.evaluate(model, lambda: False)
    assert results is not None
    if topology.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        partial = output_dir / "evaluation.json.partial"
        partial.write_text(json.dumps({"weights": origin, **results}, indent=1) + "\n")
        partial.replace(output_dir / "evaluation.json")
        print(origin, *(f"  {name} {value:.6g}" for name, value in results.items()), sep="\n", flush=True)
    return results


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients and training-time draws; afterwards the model is in training mode again if it was before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
