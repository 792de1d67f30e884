"""The loss of each sample of a micro-batch is the loss that it has alone, for every objective and however it is cut."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import AimObjective, ModelConfig, NepaObjective, ParallelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.objectives.jepa import JepaForPretraining
from megatron_nepa.objectives.objective import PretrainingModel
from megatron_nepa.parallel.topology import TensorGroup
from tests.distributed import jepa_cases
from tests.distributed.cases import MODEL, SEED, sample_images, spread_vectors
from tests.distributed.ranks import run_ranks
from tests.distributed.test_objectives import MAE
from tests.objectives.test_jepa import GivenAverage

FIRST, STEP = 40, 3
OBJECTIVES = {
    "nepa": (MODEL, NepaObjective(mask_ratio=0.4)),
    "aim": (MODEL, AimObjective(head_layers=1)),
    "aim without a prefix": (replace(MODEL, bos_token=False), AimObjective(prefix=False)),
    "mae": (replace(MODEL, causal=False, position_embedding="sincos"), MAE),
    "jepa": (jepa_cases.MODEL, jepa_cases.OBJECTIVE),
}
# on two ranks: all rows on both, whole samples on each, and rows that cut a sample, of which the last are padding
CUTS = [(sequence_parallel, batch) for sequence_parallel in (False, True) for batch in (4, 3)]


def build(name: str, parallel: ParallelConfig, tensor: TensorGroup) -> tuple[PretrainingModel, ModelConfig]:
    config, objective = OBJECTIVES[name]
    model = build_objective(config, objective, Build(parallel, tensor, seed=SEED))
    spread_vectors(model)
    model.double()
    if isinstance(model, JepaForPretraining):
        model.targets.attach(GivenAverage({n: p.detach() * 0.9 for n, p in model.trunk.named_parameters()}))
    return model, config


@torch.no_grad()
def losses_alone(name: str, count: int) -> Tensor:
    """Of each sample as the only one of its micro-batch, on one rank."""
    model, config = build(name, ParallelConfig(), TensorGroup())
    return torch.stack(
        [
            model(sample_images(range(k, k + 1), config, torch.float64), torch.tensor([k]), STEP).loss
            for k in range(FIRST, FIRST + count)
        ]
    )


def problems_on_this_rank() -> list[str]:
    tensor, problems = TensorGroup(dist.get_rank(), 2, dist.group.WORLD), []
    for name in OBJECTIVES:
        expected = losses_alone(name, 4)
        for sequence_parallel, batch in CUTS:
            model, config = build(name, ParallelConfig(2, sequence_parallel), tensor)
            share = batch // 2 if batch % 2 == 0 else batch
            first = FIRST + tensor.rank * share * (share < batch)
            images = sample_images(range(first, first + share), config, torch.float64)
            output = model(images, torch.arange(FIRST, FIRST + batch), STEP, True)
            found = output.sample_loss
            if found.requires_grad or not (found - expected[:batch]).abs().max() <= 1e-11:
                problems.append(f"{name} {sequence_parallel=} {batch=}: {found} and {expected[:batch]}")
            if not (found.mean() - output.loss).abs() <= 1e-11:
                problems.append(f"{name} {sequence_parallel=} {batch=}: mean {found.mean()} and loss {output.loss}")
    return problems


def test_a_sample_has_the_loss_that_it_has_alone() -> None:
    assert [problem for rank in run_ranks(2, problems_on_this_rank) for problem in rank] == []
