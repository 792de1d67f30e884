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

DeepSpeed's step adds all-reduces of single numbers, for the gradient norm of each parameter group and for what is not
finite: 3 over either group under ZeRO 2, 1 over the tensor-parallel ranks under ZeRO 1.

The rows of a forward pass, also one that is computed again, travel in chunks: as many calls more, of the same bytes.

Over the data-parallel ranks, with P the rank's numbers: ZeRO 2 reduces every part of the gradients to its owner in
fp32, 4 P bytes a micro-batch, in a call for each owner that has a part of a bucket; ZeRO 1 all-reduces 4 P bytes once a
step; both gather 2 P bytes of new weights at its end, a call for each of the two parameter groups.

JEPA calls the trunk's for its context's rows, for the predictor's, and forward alone for the targets' encoder, and
gathers 2 T bytes of the trunk's average once a step, a call for each of the trunk's two parameter groups, while the
context is encoded. Its predictor has two parameter groups of its own.

MAE calls the trunk's for the visible rows and for the decoder's. Each feed-forward layer of AIM's head calls half a
block's for the rows. Both have one all-reduce more for each layer that every rank holds whole, and for the head's norms
or the mask token; where ranks share the images without sequence parallelism, they gather the targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_nepa.config import (
    IMAGE_CHANNELS,
    AimObjective,
    JepaObjective,
    MaeObjective,
    ModelConfig,
    NepaObjective,
    ObjectiveConfig,
)
from megatron_nepa.planning.cluster import COLLECTIVE_START, GPUS_PER_NODE, Gpu, Ring, ring_of
from megatron_nepa.planning.layout import BF16, FP32, Layout, count_parameters
from megatron_nepa.planning.memory import BUCKET_NUMBERS, JOINED_NUMBERS
from megatron_nepa.planning.stacks import Stack, count_copied, count_trained, stacks_of

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "reduce"]
Phase = Literal["forward", "backward", "recompute", "step"]
Behind = Literal["column_products", "row_products", "input_gradient", "weight_gradient", "backward", "context"] | None


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
        chunks: of the rows of one layer, each of which hides behind the products of the others.
    """

    what: str
    kind: Kind
    group: Literal["tensor", "data"]
    phase: Phase
    calls: int
    bytes: float
    behind: Behind = None
    chunks: int = 1

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


def plan_collectives(
    model: ModelConfig, layout: Layout, objective: ObjectiveConfig = NepaObjective()
) -> list[Collective]:
    """Every collective of a micro-batch and of a step, as the table of this module lists them."""
    return _tensor_collectives(model, layout, objective) + _data_collectives(model, layout, objective)


def _parameter_groups(objective: ObjectiveConfig) -> int:
    """Of the optimizer: with weight decay and without, of JEPA's trunk and of its predictor."""
    return 4 if isinstance(objective, JepaObjective) else 2


def _norm_collective(group: Literal["tensor", "data"], zero_stage: int, groups: int) -> Collective:
    # whether a gradient is not finite (a byte), and the squared norm of every parameter group
    calls, numbers = (1 + groups, 1 + groups * FP32) if zero_stage == 2 else (1, FP32)
    return Collective("gradient norm", "all_reduce", group, "step", calls, numbers)


def _tensor_collectives(model: ModelConfig, layout: Layout, objective: ObjectiveConfig) -> list[Collective]:
    if layout.tensor_parallel_size == 1:
        return []
    stacks = stacks_of(model, layout, objective)
    found: dict[tuple[str, Phase, int], Collective] = {}
    each = [collective for stack in stacks for collective in _stack_collectives(stack)]
    if isinstance(objective, AimObjective):
        each += _head_collectives(model, layout, objective.head_layers)
    each += _outer_collectives(model, layout, objective, stacks)
    for collective in each:
        key = (collective.what, collective.phase, collective.chunks)
        if key in found:
            calls, numbers = found[key].calls + collective.calls, found[key].bytes + collective.bytes
            collective = replace(collective, calls=calls, bytes=numbers)
        found[key] = collective
    return [*found.values(), _norm_collective("tensor", layout.zero_stage, _parameter_groups(objective))]


def _call(what: str, kind: Kind, phase: Phase, calls: int, of: float, behind: Behind = None) -> list[Collective]:
    """Calls of the tensor-parallel ranks, of ``of`` bytes each."""
    return [Collective(what, kind, "tensor", phase, calls, calls * of, behind)] if calls else []


def _chunked(what: str, kind: Kind, phase: Phase, layers: int, of: float, chunks: int) -> list[Collective]:
    """Calls of the tensor-parallel ranks for the rows of ``layers`` layers, of ``of`` bytes each, cut into chunks."""
    behind: Behind = "column_products" if kind == "all_gather" else "row_products"
    return [
        replace(each, calls=layers * chunks, chunks=chunks) for each in _call(what, kind, phase, layers, of, behind)
    ]


def _stack_collectives(stack: Stack) -> list[Collective]:
    """Those inside the blocks, and of the norm before them."""
    model, layout = stack.model, stack.layout
    layers, rows = model.num_layers, BF16 * layout.all_rows(model) * model.hidden_size
    again = layers if layout.activation_checkpointing == "full" and stack.trained else 0
    back = layers if stack.trained else 0
    chunks = layout.num_chunks(model)
    if layout.sequence_parallel:
        vectors = count_parameters(model, layout.tensor_parallel_size).block_replicated
        return [
            *_chunked("rows before qkv and up", "all_gather", "forward", 2 * layers, rows, chunks),
            *_chunked("rows after out and down", "reduce_scatter", "forward", 2 * layers, rows, chunks),
            *_chunked("rows before qkv and up", "all_gather", "recompute", 2 * again, rows, chunks),
            *_chunked("rows after out and down", "reduce_scatter", "recompute", 2 * again, rows, chunks),
            *_call("rows of qkv and up again", "all_gather", "backward", 2 * back, rows, "input_gradient"),
            *_call("gradient of out and down", "all_gather", "backward", 2 * back, rows),
            *_call("gradient of qkv and up", "reduce_scatter", "backward", 2 * back, rows, "weight_gradient"),
            *_call("a block's replicated parameters", "all_reduce", "backward", back, BF16 * vectors),
            *_call("first norm", "all_reduce", "backward", int(stack.trained), 2 * BF16 * model.hidden_size),
        ]
    affine = back if model.qk_norm == "affine" else 0
    return [
        *_chunked("rows after out and down", "all_reduce", "forward", 2 * layers, rows, chunks),
        *_chunked("rows after out and down", "all_reduce", "recompute", 2 * again, rows, chunks),
        *_call("gradient of qkv and up", "all_reduce", "backward", 2 * back, rows, "weight_gradient"),
        *_call("affine QK-norm", "all_reduce", "backward", affine, 2 * BF16 * model.head_size),
    ]


def _head_collectives(model: ModelConfig, layout: Layout, layers: int) -> list[Collective]:
    """Those of the feed-forward layers of AIM's head, which are not computed again."""
    rows, chunks = BF16 * layout.all_rows(model) * model.hidden_size, layout.num_chunks(model)
    if not layout.sequence_parallel:
        return [
            *_chunked("rows after the head's down", "all_reduce", "forward", layers, rows, chunks),
            *_call("gradient of the head's up", "all_reduce", "backward", layers, rows, "weight_gradient"),
        ]
    vectors = (3 * layers + 2) * model.hidden_size
    return [
        *_chunked("rows before the head's up", "all_gather", "forward", layers, rows, chunks),
        *_chunked("rows after the head's down", "reduce_scatter", "forward", layers, rows, chunks),
        *_call("rows of the head's up again", "all_gather", "backward", layers, rows, "input_gradient"),
        *_call("gradient of the head's down", "all_gather", "backward", layers, rows),
        *_call("gradient of the head's up", "reduce_scatter", "backward", layers, rows, "weight_gradient"),
        *_call("the head's vectors", "all_reduce", "backward", 1, BF16 * vectors),
    ]


def _outer_collectives(
    model: ModelConfig, layout: Layout, objective: ObjectiveConfig, stacks: list[Stack]
) -> list[Collective]:
    """Those of the embedding, of the loss and between the stacks."""
    if not layout.sequence_parallel:
        if layout.images_per_rank == layout.micro_batch_size:
            return []
        rows = [BF16 * layout.all_rows(stack.model) * model.hidden_size for stack in stacks if stack.embeds]
        numbers = _embedding_numbers(model, with_positions=False)
        predicts_pixels = isinstance(objective, AimObjective | MaeObjective)
        pixels = FP32 * layout.all_rows(model) * IMAGE_CHANNELS * model.patch_size**2
        return [
            *(each for of in rows for each in _call("embedded rows", "all_gather", "forward", 1, of)),
            *_call("targets", "all_gather", "forward", int(predicts_pixels), pixels),
            *_call("embedding", "all_reduce", "backward", 1, BF16 * numbers),
        ]
    found = _call("embedding", "all_reduce", "backward", 1, BF16 * _embedding_numbers(model, with_positions=True))
    if isinstance(objective, NepaObjective):
        return [*found, *_call("loss", "all_reduce", "forward", 1, 4 * FP32)]
    if isinstance(objective, AimObjective | MaeObjective):
        return found + _pixel_collectives(model, layout, objective, stacks)
    width = objective.predictor_hidden_size
    numbers = 2 * width * model.hidden_size + 2 * width + model.hidden_size
    found += _call("the predictor's outer layers", "all_reduce", "backward", 1, BF16 * numbers)
    found += _call("loss", "all_reduce", "forward", 1, 3 * FP32)
    if layout.micro_batch_size % layout.tensor_parallel_size:  # rows that cut a sample are joined
        context, _, targets = stacks
        found += _joined_rows("the context's features", context, width)
        rows_of_targets = layout.all_rows(targets.model)
        found += _call("the targets", "all_gather", "forward", 1, BF16 * rows_of_targets * model.hidden_size)
    return found


def _pixel_collectives(
    model: ModelConfig, layout: Layout, objective: AimObjective | MaeObjective, stacks: list[Stack]
) -> list[Collective]:
    """Under sequence parallelism: of the layer that predicts pixels, of their loss, and before MAE's decoder."""
    width, pixels = stacks[-1].model.hidden_size, IMAGE_CHANNELS * model.patch_size**2
    found = _call("the pixels' layer", "all_reduce", "backward", 1, BF16 * (width + 1) * pixels)
    found += _call("loss", "all_reduce", "forward", 1, FP32)
    if isinstance(objective, AimObjective):
        return found
    found += _call("the decoder's first layer", "all_reduce", "backward", 1, BF16 * (model.hidden_size + 1) * width)
    found += _call("mask token", "all_reduce", "backward", 1, BF16 * width)
    if layout.micro_batch_size % layout.tensor_parallel_size:  # rows that cut a sample are joined
        found += _joined_rows("the visible patches", stacks[0], width)
    return found


def _joined_rows(what: str, stack: Stack, width: int) -> list[Collective]:
    """Of a stack's rows that every rank is given all of, and of their gradient, which has no padding."""
    rows = stack.layout.micro_batch_size * stack.model.sequence_length
    return [
        *_call(what, "all_gather", "forward", 1, BF16 * stack.layout.all_rows(stack.model) * width),
        *_call(f"gradient of {what}", "all_reduce", "backward", 1, BF16 * rows * width),
    ]


def _embedding_numbers(model: ModelConfig, with_positions: bool) -> int:
    width = model.hidden_size
    positions = model.sequence_length if with_positions and model.position_embedding == "learned" else 0
    return (IMAGE_CHANNELS * model.patch_size**2 + 1 + int(model.bos_token) + positions) * width


def _data_collectives(model: ModelConfig, layout: Layout, objective: ObjectiveConfig) -> list[Collective]:
    replicas = layout.data_parallel_size
    if replicas == 1:
        return []
    numbers = count_trained(model, layout.tensor_parallel_size, objective)
    groups = _parameter_groups(objective)
    if layout.zero_stage == 2:
        # an estimate: a bucket that is full cuts an owner's part of any parameter group
        calls = replicas + groups * (-(-numbers // BUCKET_NUMBERS) - 1)
        name, behind = "gradients, each part to its owner", "backward"
        gradients = Collective(name, "reduce", "data", "backward", calls, FP32 * numbers, behind)  # type: ignore[arg-type]
    else:
        calls = 1 if numbers <= JOINED_NUMBERS else 2
        gradients = Collective("gradients", "all_reduce", "data", "step", calls, FP32 * numbers)
    weights = Collective("new weights", "all_gather", "data", "step", groups, BF16 * numbers)
    found = [gradients, weights]
    if isinstance(objective, JepaObjective):
        trunk = BF16 * count_copied(model, layout.tensor_parallel_size)
        found.append(Collective("average of the trunk", "all_gather", "data", "step", 2, trunk, "context"))
    return found + [_norm_collective("data", 2, groups)] * (layout.zero_stage == 2)
