"""JEPA on any grid, and deliberate mistakes that the equality suite must notice."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nepa.config import JepaObjective, ModelConfig
from megatron_nepa.objectives import block_masks, jepa, predictor
from megatron_nepa.parallel.collectives import gather_rows
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine import engine as engine_module
from megatron_nepa.training.engine.average_copy import AverageCopy
from tests.distributed.cases import Case, Mutation
from tests.distributed.test_mutations import drop_gradient_sum

# 6 x 6 patches; every switch that draws or sums something is on
MODEL = ModelConfig(
    image_size=84,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    mlp="gelu",
    mlp_hidden_size=96,
    qk_norm="affine",
    rope_rescale=2.0,
    position_embedding="sincos",
    causal=False,
    drop_path=0.3,
)
# whose decay is that of the suite's runs
OBJECTIVE = JepaObjective(
    predictor_hidden_size=32, predictor_num_layers=2, predictor_num_heads=4, num_targets=3, momentum=0.9
)
CASE = Case(model=MODEL, objective=OBJECTIVE)


def raw_weights(model: nn.Module, topology: Topology) -> None:
    """The targets come from the weights rather than from their average."""

    def mutated(part: Any, prefix: str, masters: Any, average: Any, *others: Any) -> AverageCopy:
        return AverageCopy(part, prefix, masters, masters.flats, *others)

    engine_module.AverageCopy = mutated  # type: ignore[assignment, misc]


class FirstCopy(AverageCopy):
    """Never brought up to date again."""

    def outdate(self) -> None:
        pass


class MisplacedCopy(AverageCopy):
    """Every rank's shard lies where the next rank's belongs."""

    def wait(self) -> None:
        had_work = bool(self._gathering)
        super().wait()
        if had_work:
            for group in self._groups.values():
                group.copy_(group.roll(group.numel() // 2))


def copied_by(cls: type[AverageCopy], model: nn.Module, topology: Topology) -> None:
    engine_module.AverageCopy = cls  # type: ignore[misc]


def mask_keyed_by_rank(purpose: str, rank: str, model: nn.Module, topology: Topology) -> None:
    """The places, or the patches that are left out, differ from rank to rank."""
    real = block_masks.derive_key
    number = topology.tensor.rank if rank == "tensor" else topology.data_rank
    block_masks.derive_key = lambda seed, name: real(seed + number if name == purpose else seed, name)  # type: ignore


def sizes_by_micro_batch(model: nn.Module, topology: Topology) -> None:
    """The blocks' sizes change with the micro-batch, as the published collator's."""
    real = jepa.block_masks

    def mutated(objective: Any, grid: Any, seed: int, step: int, sample_index: Tensor) -> Any:
        return real(objective, grid, seed, int(sample_index[0]), sample_index)

    jepa.block_masks = mutated


def targets_in_training(model: nn.Module, topology: Topology) -> None:
    """The targets see DropPath and the RoPE rescale."""
    model.targets.trunk.train()  # type: ignore[union-attr]


def unsummed_context(model: nn.Module, topology: Topology) -> None:
    """The context's rows that each rank uses a share of get that share's gradient alone."""

    predictor.join_rows = lambda own, num_rows, tensor: gather_rows(own, tensor)[:num_rows]  # type: ignore[assignment]


def padding_counts(model: nn.Module, topology: Topology) -> None:
    """The context's tokens are predicted, too."""
    real = jepa.JepaForPretraining._pairs

    def mutated(self: Any, *arguments: Any) -> Any:
        prediction, target, weight = real(self, *arguments)
        return prediction, target, torch.ones_like(weight)

    model._pairs = partial(mutated, model)


def unsummed(part: str, model: nn.Module, topology: Topology) -> None:
    drop_gradient_sum(part, model, topology)
    from megatron_nepa.models import transformer

    predictor.sum_split_gradients = transformer.sum_split_gradients  # type: ignore[attr-defined]


MUTATIONS: dict[str, Mutation] = {
    "targets from the raw weights": raw_weights,
    "the first average for ever": partial(copied_by, FirstCopy),
    "shards in the wrong place": partial(copied_by, MisplacedCopy),
    "places keyed by the tensor-parallel rank": partial(mask_keyed_by_rank, "block_places", "tensor"),
    "places keyed by the replica": partial(mask_keyed_by_rank, "block_places", "data"),
    "patches left out keyed by the replica": partial(mask_keyed_by_rank, "context_patches", "data"),
    "sizes by micro-batch": sizes_by_micro_batch,
    "targets in training mode": targets_in_training,
    "gradient sum of the context's rows": unsummed_context,
    "a loss over the context's rows": padding_counts,
    "gradient sum of the mask token": partial(unsummed, "predictor.mask_token"),
    "gradient sum of the predictor's first layer": partial(unsummed, "predictor.in_weight"),
}
