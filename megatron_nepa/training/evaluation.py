"""Evaluating a model: its raw weights and their average, while it is trained or alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_nepa.checkpoint.described import holds_weights_alone
from megatron_nepa.checkpoint.format.manifest import read_manifest
from megatron_nepa.checkpoint.format.masters import Masters
from megatron_nepa.checkpoint.format.state import TrainState
from megatron_nepa.checkpoint.initial import start_from
from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.weights import Choice
from megatron_nepa.checkpoint.saving.checkpoints_folder import CheckpointStore
from megatron_nepa.config import ModelConfig, RunConfig, require
from megatron_nepa.data.index.agreement import compare_with_head
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.reporting.metric_display import describe_result
from megatron_nepa.training.results import identify_weights, require_results, write_results
from megatron_nepa.training.task import Evaluator, Task

RESULTS_FILE = "evaluation.json"
RESULT_OF_AVERAGE = "ema_"  # what the average's results have in their names in the log, after the evaluator's prefix


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
        weights.append((RESULT_OF_AVERAGE, engine.averaged_weights()))
    for kind, chosen in weights:
        with chosen, evaluation_mode(engine.module):
            found = evaluator.evaluate(engine.module, interrupted)
        if found is None:
            return None
        results |= {f"{evaluator.prefix}{kind}{name}": value for name, value in found.items()}
    return results


def best_of(evaluator: Evaluator, results: dict[str, float], is_young: bool) -> tuple[str, float] | None:
    """The result by which the best checkpoint is kept: of the average, or of the raw weights where they are ahead.

    Args:
        evaluator: the evaluator that measured.
        results: what :func:`evaluate_engine` returned.
        is_young: whether the average is still so near to its beginning that only the raw weights count.

    Returns:
        Its name in the log, and the value; None where the evaluator names none.
    """
    if evaluator.best is None:
        return None
    raw, average = _names_of_best(evaluator)
    name = raw if is_young or results.get(average, -math.inf) < results[raw] else average
    return name, results[name]


def describe_lag(evaluator: Evaluator, results: dict[str, float], initial_share: float, is_young: bool) -> str | None:
    """The sentence for an evaluation in which the average is behind the raw weights, or is young; None elsewhere.

    Args:
        evaluator: the evaluator that measured.
        results: what :func:`evaluate_engine` returned.
        initial_share: of the average, that is still the weights which it began with.
        is_young: whether that share is too large for the average to say much.
    """
    raw, average = _names_of_best(evaluator)
    if evaluator.best is None or average not in results or (results[average] >= results[raw] and not is_young):
        return None
    numbers = ", ".join(describe_result(name, results[name]) for name in (average, raw))
    if is_young:
        return f"the weight average is still {initial_share:.0%} the weights that the run began with: {numbers}"
    return f"the weight average is behind the raw weights: {numbers}"


def _names_of_best(evaluator: Evaluator) -> tuple[str, str]:
    """The names in the log of the raw weights' and the average's result."""
    return f"{evaluator.prefix}{evaluator.best}", f"{evaluator.prefix}{RESULT_OF_AVERAGE}{evaluator.best}"


def evaluate_only(run: RunConfig, task: Task, kernels: Kernels, topology: Topology) -> dict[str, float]:
    """Evaluate a checkpoint without training; every rank calls it.

    The weights are those of ``run.init_from`` (any checkpoint, the release's included), or else of the best or newest
    checkpoint in ``run.output_dir``: the average, or of the best one the raw weights where they made it the best. The
    results go with their settings to ``evaluation.json`` there (see :mod:`~megatron_nepa.training.results`) and to the
    console.

    Raises:
        ConfigError: where there is no checkpoint, or it does not fit the model.
    """
    evaluator = task.evaluator
    assert evaluator is not None
    output_dir = Path(run.output_dir)
    require_results(output_dir / RESULTS_FILE, topology)
    source = run.init_from
    choice: Choice | None = "raw" if run.init_weights == "raw" else None  # a run may have kept no average
    if source is None:
        store = CheckpointStore.of(output_dir)
        best = store.best()
        source = str(best or find_checkpoint(run.output_dir))
        if best is not None and not store.best_metric().startswith(f"{evaluator.prefix}{RESULT_OF_AVERAGE}"):
            choice = "raw"
    if not holds_weights_alone(source):
        trained = read_manifest(find_checkpoint(source))["run"]
        remedy = "evaluate images that are labelled as the training images were"
        note = compare_with_head(source, trained.get("classes"), task.classes, "the validation images", remedy)
        if note is not None and topology.is_main:
            print(note)
        _require_same_features(source, trained.get("trunk"), run.to_dict().get("trunk"))
    model = task.build_model(kernels).to(topology.device, DTYPES[run.trained_dtype])
    origin = load_weights(model, source, choice, run.model, topology)
    with evaluation_mode(model):
        results = evaluator.evaluate(model, lambda: False)
    assert results is not None
    if topology.is_main:
        settings = {**identify_weights(source, choice), **task.evaluation_settings()}
        write_results(output_dir / RESULTS_FILE, origin, settings, results)
    return results


def _require_same_features(source: str, trained: dict[str, Any] | None, features: dict[str, Any] | None) -> None:
    """A probe's layer means nothing on another block, or other weights, than it was trained on."""
    if trained is None or features is None:
        return
    differing = [
        f"--trunk.{key} {trained[key]}, not {features[key]}"
        for key in ("weights", "block", "pooling")
        if trained[key] != features[key]
    ]
    require(not differing, f"the probe in {source} was trained with {', '.join(differing)}: give the same here.")


def load_weights(model: nn.Module, source: str, choice: Choice | None, config: ModelConfig, topology: Topology) -> str:
    """Give a model that is not trained the weights of a checkpoint; every rank calls it.

    Args:
        model: this rank's model, on its device.
        source: any checkpoint, as ``--init_from`` takes it.
        choice: the average or the raw weights, where there are both; None takes the average where there is one.
        config: the model's shape.
        topology: this rank's place.

    Returns:
        What was loaded, in words.

    Raises:
        ConfigError: where there is no checkpoint, or it does not fit the model.
    """
    # no optimizer: the weights are the model's own parameters
    bare = TrainState(model, Masters(torch.optim.AdamW(model.parameters()), [], {}), None, topology)
    return start_from(bare, source, choice, config, require_head=True)


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
