"""The collectives of a training step: how many, how many bytes, and how long each takes.

A tensor-parallel rank calls, in one micro-batch, with [N, D] all rows in bf16 (2 N D bytes) and L blocks:

| | all-gather | reduce-scatter | all-reduce |
|---|---|---|---|
| with sequence parallelism, a block: forward | 2 [N, D] | 2 [N, D] | |
| backward | 4 [N, D] | 2 [N, D] | 1 of its replicated parameters |
| forward again, under full activation checkpointing | 2 [N, D] | 2 [N, D] | |
| outside the blocks | | | 3: embedding, first norm, loss |
| without it, a block: forward | | | 2 [N, D] |
| backward | | | 2 [N, D], and 1 of an affine QK-norm |
| forward again, under full activation checkpointing | | | 2 [N, D] |
| outside the blocks, where ranks share the images | 1 [N, D] | | 1: embedding |

DeepSpeed's step adds all-reduces of single numbers, for the gradient norm and for what is not finite: 3 over either
group under ZeRO 2, 1 over the tensor-parallel ranks under ZeRO 1.

Over the data-parallel ranks, with P the rank's numbers: ZeRO 2 reduces every part of the gradients to its owner in
fp32, 4 P bytes a micro-batch, in a call for each owner that has a part of a bucket; ZeRO 1 all-reduces 4 P bytes once a
step; both gather 2 P bytes of new weights at its end, a call for each of the two parameter groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig
from megatron_nepa.planning.cluster import COLLECTIVE_START, GPUS_PER_NODE, Gpu, Ring, ring_of
from megatron_nepa.planning.layout import Layout, count_parameters
from megatron_nepa.planning.memory import BF16, BUCKET_NUMBERS, FP32, JOINED_NUMBERS

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "reduce"]
Phase = Literal["forward", "backward", "recompute", "step"]
Behind = Literal["input_gradient", "weight_gradient", "backward"] | None


@dataclass(frozen=True)
class Collective:
    """Equal calls of one phase.

    Attributes:
        what: it moves.
        kind: name of the collective, such as "all_gather".
        group: which ranks take part.
        phase: of a micro-batch, or "step": once an optimizer step.
        calls: in that phase.
        bytes: of the whole tensors of all calls: what an all-gather returns, what a reduction is given.
        behind: the kernels that run while it is on its way; None where the rank waits.
    """

    what: str
    kind: Kind
    group: Literal["tensor", "data"]
    phase: Phase
    calls: int
    bytes: float
    behind: Behind = None

    def seconds(self, ring: Ring) -> float:
        """Time of all calls, one after another, on the group's ring.

        An all-gather or reduce-scatter sends (size - 1) / size of the tensor, an all-reduce twice that. A reduction to
        one owner sends all of it down the ring; the owners follow one another, so their calls fill the ring behind
        each other and its latency counts once.
        """
        if ring.size == 1:
            return 0.0
        share = (ring.size - 1) / ring.size
        sent = {"all_gather": share, "reduce_scatter": share, "all_reduce": 2 * share, "reduce": 1.0}[self.kind]
        latency = {"all_reduce": self.calls * ring.all_reduce, "reduce": ring.turn}.get(
            self.kind, self.calls * ring.turn
        )
        return self.calls * COLLECTIVE_START + latency + sent * self.bytes / ring.bandwidth


def tensor_ring(gpu: Gpu, layout: Layout) -> Ring:
    """The tensor-parallel ranks: neighbours, inside a node."""
    return ring_of(gpu, layout.tensor_parallel_size, min(GPUS_PER_NODE, layout.tensor_parallel_size))


def data_ring(gpu: Gpu, layout: Layout) -> Ring:
    """The ranks that hold the same part of the weights, every ``tensor_parallel_size``-th one."""
    return ring_of(gpu, layout.data_parallel_size, max(1, GPUS_PER_NODE // layout.tensor_parallel_size))


def plan_collectives(model: ModelConfig, layout: Layout) -> list[Collective]:
    """Every collective of a micro-batch and of a step, as the table of this module lists them."""
    return _tensor_collectives(model, layout) + _data_collectives(model, layout)


def _norm_collective(group: Literal["tensor", "data"], zero_stage: int) -> Collective:
    # whether a gradient is not finite (a byte), the squared norm and its check
    calls, numbers = (3, 1 + 2 * FP32) if zero_stage == 2 else (1, FP32)
    return Collective("gradient norm", "all_reduce", group, "step", calls, numbers)


def _tensor_collectives(model: ModelConfig, layout: Layout) -> list[Collective]:
    size, layers = layout.tensor_parallel_size, model.num_layers
    if size == 1:
        return []
    rows = BF16 * layout.all_rows(model) * model.hidden_size
    affine = model.qk_norm == "affine"
    found: list[Collective] = []

    def add(what: str, kind: Kind, phase: Phase, calls: int, of: float, behind: Behind = None) -> None:
        if calls:
            found.append(Collective(what, kind, "tensor", phase, calls, calls * of, behind))

    again = layers if layout.activation_checkpointing == "full" else 0
    if layout.sequence_parallel:
        for phase, blocks in (("forward", layers), ("recompute", again)):
            add("rows before qkv and up", "all_gather", phase, 2 * blocks, rows)  # type: ignore[arg-type]
            add("rows after out and down", "reduce_scatter", phase, 2 * blocks, rows)  # type: ignore[arg-type]
        add("rows of qkv and up again", "all_gather", "backward", 2 * layers, rows, "input_gradient")
        add("gradient of out and down", "all_gather", "backward", 2 * layers, rows)
        add("gradient of qkv and up", "reduce_scatter", "backward", 2 * layers, rows, "weight_gradient")
        vectors = count_parameters(model, size).block_replicated
        add("a block's replicated parameters", "all_reduce", "backward", layers, BF16 * vectors)
        add("first norm", "all_reduce", "backward", 1, 2 * BF16 * model.hidden_size)
        add("embedding", "all_reduce", "backward", 1, BF16 * _embedding_numbers(model, with_positions=True))
        add("loss", "all_reduce", "forward", 1, 4 * FP32)
    else:
        add("rows after out and down", "all_reduce", "forward", 2 * layers, rows)
        add("rows after out and down", "all_reduce", "recompute", 2 * again, rows)
        add("gradient of qkv and up", "all_reduce", "backward", 2 * layers, rows, "weight_gradient")
        add("affine QK-norm", "all_reduce", "backward", layers * affine, 2 * BF16 * model.head_size)
        if layout.images_per_rank < layout.micro_batch_size:
            add("embedded rows", "all_gather", "forward", 1, rows)
            add("embedding", "all_reduce", "backward", 1, BF16 * _embedding_numbers(model, with_positions=False))
    return [*found, _norm_collective("tensor", layout.zero_stage)]


def _embedding_numbers(model: ModelConfig, with_positions: bool) -> int:
    width = model.hidden_size
    positions = model.sequence_length if with_positions and model.position_embedding == "learned" else 0
    return (IMAGE_CHANNELS * model.patch_size**2 + 1 + int(model.bos_token) + positions) * width


def _data_collectives(model: ModelConfig, layout: Layout) -> list[Collective]:
    replicas = layout.data_parallel_size
    if replicas == 1:
        return []
    numbers = count_parameters(model, layout.tensor_parallel_size).local
    if layout.zero_stage == 2:
        # an estimate: a bucket that is full cuts an owner's part of either parameter group
        calls = replicas + 2 * (-(-numbers // BUCKET_NUMBERS) - 1)
        name, behind = "gradients, each part to its owner", "backward"
        gradients = Collective(name, "reduce", "data", "backward", calls, FP32 * numbers, behind)  # type: ignore[arg-type]
    else:
        calls = 1 if numbers <= JOINED_NUMBERS else 2
        gradients = Collective("gradients", "all_reduce", "data", "step", calls, FP32 * numbers)
    weights = Collective("new weights", "all_gather", "data", "step", 2, BF16 * numbers)
    return [gradients, weights] + [_norm_collective("data", 2)] * (layout.zero_stage == 2)
