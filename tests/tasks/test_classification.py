"""The classifier and its training: the release's logits, every grid like one rank, exact accuracy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_nepa.checkpoint.conversion.release_config import model_from_release
from megatron_nepa.checkpoint.format.release_names import from_release
from megatron_nepa.config import ClassificationConfig, EvaluationConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.classifier import Classifier, Pooling
from megatron_nepa.parallel.collectives import gather_rows
from megatron_nepa.parallel.random import derive_key
from megatron_nepa.parallel.topology import Topology, build_topology
from megatron_nepa.tasks.classification import ClassificationEvaluator
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.evaluation import evaluate_engine, evaluation_mode
from tests.distributed.cases import MODEL, SEED, Case, build_engine, differences, local_samples, train_case
from tests.distributed.ranks import run_ranks
from tests.models.test_release_parity import FOLDER
from tests.tasks.labelled import make_labelled

CLASSES = 5


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no golden tensors of the release in {FOLDER}; set NEPA_PARITY_DIR")
def test_the_releases_logits() -> None:
    config = model_from_release(json.loads((FOLDER / "meta.json").read_text())["cls_bidir_pool"])
    golden = load_file(FOLDER / "cls_bidir_pool.safetensors")
    model = Classifier(config, 10, "mean").eval()
    released = {key.removeprefix("sd."): value for key, value in golden.items() if key.startswith("sd.")}
    model.load_state_dict(from_release(released, config))
    logits = model(golden["in.pixel_values"], torch.arange(2))
    # of the largest logit: the golden ones, in fp32 themselves, are 1.03e-6 off the same function in fp64
    tolerance = 1e-6 * golden["out.logits"].abs().max().item()
    torch.testing.assert_close(logits, golden["out.logits"], atol=tolerance, rtol=0)


@dataclass(frozen=True)
class ClassificationCase(Case):
    """A classifier on soft targets that are a function of the sample's number."""

    pooling: Pooling = "mean"

    def build(self, run: RunConfig, topology: Topology, kernels: Kernels) -> nn.Module:
        model = Classifier(run.model, CLASSES, self.pooling, Build.of(run, topology.tensor, kernels))
        generator = torch.Generator().manual_seed(SEED)  # at its initial 0 the trunk would get no gradient
        nn.init.normal_(model.classifier.weight, std=0.2, generator=generator)
        return model

    def loss(self, engine: TrainingEngine, images: Tensor, sample_index: Tensor) -> Tensor:
        logits = engine.forward(images, sample_index)
        tensor = engine.topology.tensor
        local = local_samples(int(sample_index[0]), len(sample_index), engine.topology)
        targets = torch.stack([target_of(k) for k in local])
        if len(local) < len(sample_index):
            targets = gather_rows(targets, tensor)
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def target_of(sample: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_key(SEED, "target", sample) >> 1)
    return torch.rand(CLASSES, generator=generator).softmax(0)


BIDIRECTIONAL = ModelConfig(**{**MODEL.__dict__, "causal": False, "freeze_patch_embedding": True})


@pytest.mark.parametrize(
    ("case", "grids"),
    [
        (
            ClassificationCase(model=BIDIRECTIONAL, pooling="mean"),
            [
                {"data_size": 2, "tensor_size": 2, "sequence_parallel": True},
                {"tensor_size": 2, "sequence_parallel": True, "micro_batch_size": 1},  # rows that cut a sample
            ],
        ),
        (ClassificationCase(pooling="last"), [{"data_size": 2, "tensor_size": 2, "zero_stage": 1}]),
    ],
    ids=["mean", "last"],
)
def test_a_grid_computes_what_one_rank_computes(case: ClassificationCase, grids: list[dict[str, Any]]) -> None:
    serial = run_ranks(1, train_case, case.on(zero_stage=0, micro_batch_size=8))[0]
    for grid in grids:
        found = run_ranks(case.on(**grid).grid.world_size, train_case, case.on(**grid))[0]
        assert differences(found, serial) == [], grid


def evaluate(folder: Path, parallel: tuple[int, bool]) -> tuple[dict[str, float], int]:
    """Accuracy of a fixed classifier, and how many batches this rank saw."""
    model_config = ModelConfig(image_size=32, patch_size=8, hidden_size=32, num_layers=1, num_heads=2, causal=False)
    topology = build_topology(torch.device("cpu"), parallel[0])
    run = ClassificationConfig(
        model=model_config,
        parallel=ParallelConfig(*parallel),
        evaluation=EvaluationConfig(batch_size=3, resize_size=40),
        dtype="fp32",
        steps=1,
    )
    model = Classifier(model_config, 3, "mean", Build(run.parallel, topology.tensor, seed=SEED))
    nn.init.normal_(model.classifier.weight, std=0.5, generator=torch.Generator().manual_seed(SEED))
    calls = [0]

    def interrupted() -> bool:
        calls[0] += 1
        return False

    evaluator = ClassificationEvaluator(run, scan_folder(folder), topology, every=1)
    with evaluation_mode(model):
        results = evaluator.evaluate(model, interrupted)
    assert results is not None
    return results, calls[0]


def test_accuracy_is_exact_on_any_number_of_ranks(tmp_path: Path) -> None:
    folder = make_labelled(tmp_path, per_class=5)  # 15 images: no multiple of 2, 4 or of the batch
    results = {
        grid: run_ranks(ranks, evaluate, folder, grid)
        for grid, ranks in {(1, False): 1, (2, True): 2, (2, False): 4}.items()
    }
    reference = results[(1, False)][0][0]
    assert 0 < reference["top1"] < 1  # a number that could differ
    assert reference["top1"] * 15 == pytest.approx(round(reference["top1"] * 15))
    assert reference["top5"] == 1  # three classes
    for ranks in results.values():
        for found, batches in ranks:
            assert batches == ranks[0][1]
            assert (found["top1"], found["top5"]) == (reference["top1"], reference["top5"])
            assert found["loss"] == pytest.approx(reference["loss"], abs=1e-6)


class Probe:
    """An evaluator that returns what it sees of the weights."""

    every, prefix, best, at_start = 1, "val_", None, False

    def decode_all(self, interrupted: Any) -> None: ...

    def evaluate(self, model: nn.Module, interrupted: Any) -> dict[str, float]:
        assert not model.training
        return {"weight": sum(param.double().abs().sum().item() for param in model.parameters())}


def evaluate_average() -> tuple[dict[str, float], float, float, bool]:
    case = Case(steps=1).on(data_size=2, micro_batch_size=2)
    engine = build_engine(case)
    topology = engine.topology
    first = torch.arange(2) + 2 * topology.data_rank
    for step in range(2):
        for accumulation in range(engine.accumulation_steps):
            images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(step))
            engine.backward(engine.forward(images, first).loss)
            if accumulation < engine.accumulation_steps - 1:
                engine.end_micro_batch()
        engine.step(1e-2)
    before = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    raw = sum(param.double().abs().sum().item() for param in engine.module.parameters())
    found = evaluate_engine(engine, Probe(), lambda: False)
    assert found is not None
    same = all(torch.equal(param, before[name]) for name, param in engine.module.named_parameters())
    with engine.averaged_weights():
        average = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    from tests.distributed.cases import join_state

    state = join_state(engine)
    distance = max((average[name].flatten() - state[f"ema.{name}"].flatten()).abs().max().item() for name in average)
    return found, raw, distance, same and engine.module.training


def test_raw_weights_and_their_average_are_evaluated_and_put_back() -> None:
    for found, raw, distance, put_back in run_ranks(2, evaluate_average):
        assert found["val_weight"] == pytest.approx(raw)
        assert found["val_ema_weight"] != found["val_weight"]
        assert distance == 0
        assert put_back
