"""Predict a run's step time and memory for one layout, and find the best layouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import get_args

from megatron_nepa.config import (
    ActivationCheckpointing,
    ConfigError,
    ModelConfig,
    NepaObjective,
    ObjectiveConfig,
    PretrainingConfig,
    divisors,
    multiples_around,
    one_of,
    require,
)
from megatron_nepa.objectives.flops import pretraining_flops
from megatron_nepa.planning.cluster import GPUS_PER_NODE, Gpu
from megatron_nepa.planning.communication import Collective, data_ring, plan_collectives, tensor_ring
from megatron_nepa.planning.compute import Work, block_work, gradient_seconds, optimizer_seconds, outer_work
from megatron_nepa.planning.layout import Layout
from megatron_nepa.planning.memory import BUCKET_NUMBERS, Memory, plan_memory
from megatron_nepa.planning.stacks import count_trained, stacks_of

LARGEST_MICRO_BATCH = 1024
# Seconds that a block's kernels, about 50 forward and backward, take the host to launch at 10 us each: an assumption,
# which changes no prediction and marks those that it makes doubtful.
HOST_SECONDS_OF_A_BLOCK = 0.5e-3


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what the GPU does or waits for.

    Attributes:
        forward, backward, recompute: kernels of all micro-batches.
        tensor_collectives: waiting for the tensor-parallel ranks.
        data_collectives: waiting for gradients and new weights of the data-parallel ranks.
        gradients: DeepSpeed's passes over the gradients.
        optimizer: clipping, AdamW and the weight average.
    """

    forward: float
    backward: float
    recompute: float
    tensor_collectives: float
    data_collectives: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What one layout of a run would need and take.

    Attributes:
        layout: how the run is spread.
        accumulation_steps: micro-batches of a step.
        memory: what one GPU holds, part by part.
        fits: whether that is within the GPU's.
        time: how long a step takes.
        images_per_second: throughput of the whole run.
        mfu: model FLOP/s over the GPUs' dense bf16 peak.
        host_bound: whether the host probably needs longer to launch a block's kernels than they run, so that the time
            is too hopeful.
        collectives: of a micro-batch and of a step, each with its seconds.
    """

    layout: Layout
    accumulation_steps: int
    memory: Memory
    fits: bool
    time: StepTime
    images_per_second: float
    mfu: float
    host_bound: bool
    collectives: list[tuple[Collective, float]]


def predict(run: PretrainingConfig, layout: Layout, gpu: Gpu) -> Plan:
    """Memory and time of ``run`` under ``layout``.

    Raises:
        ConfigError: for a layout that does not fit the run: heads or widths that the tensor-parallel size does not
            divide, a batch that the replicas do not.
    """
    size = layout.tensor_parallel_size
    require(
        layout.gpus % size == 0,
        f"tensor_parallel_size {size} does not divide {layout.gpus} GPUs: take "
        f"{one_of(multiples_around(layout.gpus, size))} GPUs, or tensor_parallel_size {one_of(divisors(layout.gpus))}.",
    )
    run = layout.apply(run)
    accumulation = run.accumulation_steps(layout.data_parallel_size)
    memory = plan_memory(run.model, layout, accumulation, run.optimizer.ema_decay > 0, run.objective)
    rings = {"tensor": tensor_ring(gpu, layout), "data": data_ring(gpu, layout)}
    collectives = [
        (each, each.seconds(rings[each.group])) for each in plan_collectives(run.model, layout, run.objective)
    ]
    time = step_time(run.model, layout, gpu, accumulation, collectives, run.objective)
    rate = run.global_batch_size / time.total
    stacks = [stack for stack in stacks_of(run.model, layout, run.objective) if stack.trained]
    blocks = [
        (stack.model.num_layers, sum(work.seconds for work in block_work(stack.model, stack.layout, gpu)))
        for stack in stacks
    ]
    block_seconds = sum(count * each for count, each in blocks) / sum(count for count, _ in blocks)
    return Plan(
        layout=layout,
        accumulation_steps=accumulation,
        memory=memory,
        fits=memory.total <= gpu.memory_bytes,
        time=time,
        images_per_second=rate,
        mfu=rate * pretraining_flops(run) / (layout.gpus * gpu.peak_flops),
        host_bound=block_seconds < HOST_SECONDS_OF_A_BLOCK,
        collectives=collectives,
    )


def step_time(
    model: ModelConfig,
    layout: Layout,
    gpu: Gpu,
    accumulation_steps: int,
    collectives: list[tuple[Collective, float]],
    objective: ObjectiveConfig = NepaObjective(),
) -> StepTime:
    """Add up kernels, and the collectives that nothing hides.

    The gathers and scatters of a column-parallel layer's backward pass run behind its two products. In the forward pass
    all chunks of a layer's rows but one run behind its product, as far as that takes as long. ZeRO 2's
    reductions run behind the backward pass, but for the last bucket's: its gradients are the last ones. JEPA's gather
    of the average runs behind the context's blocks.
    """
    stacks = stacks_of(model, layout, objective)
    blocks = [block_work(stack.model, stack.layout, gpu) for stack in stacks]
    outside = outer_work(model, layout, gpu, objective)
    forward, backward = _seconds(outside, "forward"), 0.0
    recompute = 0.0
    hidden = {"input_gradient": 0.0, "weight_gradient": 0.0}
    products: dict[tuple[str, str, int], float] = defaultdict(float)  # what chunks hide behind
    for stack, block in zip(stacks, blocks, strict=True):
        layers = stack.model.num_layers
        forward += layers * _seconds(block, "forward")
        for behind, names in (("column_products", ("qkv", "up")), ("row_products", ("out", "down"))):
            seconds = layers * _seconds([work for work in block if work.name in names], "forward")
            products[behind, "forward", stack.layout.num_chunks(stack.model)] += seconds
            products[behind, "recompute", stack.layout.num_chunks(stack.model)] += seconds * stack.trained
        if stack.trained:
            backward += sum(layers * work.seconds for work in block if work.phase != "forward")
            recompute += layers * _recompute_seconds(block, layout)
            column_parallel = [work for work in block if work.name in ("qkv", "up")]
            for phase in hidden:
                hidden[phase] += layers * _seconds(column_parallel, phase)
    backward += sum(work.seconds for work in outside if work.phase != "forward")
    numbers = count_trained(model, layout.tensor_parallel_size, objective)
    gradients = gradient_seconds(numbers, gpu)
    context = stacks[0].model.num_layers * _seconds(blocks[0], "forward")

    waiting = {"tensor": 0.0, "data": 0.0}
    for collective, seconds in collectives:
        if collective.behind == "backward":
            last_bucket = seconds / -(-numbers // BUCKET_NUMBERS)
            seconds = max(last_bucket, seconds - backward - recompute)
        elif collective.behind == "context":
            seconds = max(0.0, seconds - context)
        elif collective.behind in ("column_products", "row_products"):
            first = seconds / collective.chunks  # or last: nothing of its layer is computed meanwhile
            beside = products[collective.behind, collective.phase, collective.chunks]
            seconds = first + max(0.0, seconds - beside) * (1 - 1 / collective.chunks)
        elif collective.behind is not None:
            seconds = max(0.0, seconds - hidden[collective.behind])
        waiting[collective.group] += seconds * (1 if collective.phase == "step" else accumulation_steps)
    return StepTime(
        forward=accumulation_steps * forward,
        backward=accumulation_steps * backward,
        recompute=accumulation_steps * recompute,
        tensor_collectives=waiting["tensor"],
        data_collectives=waiting["data"],
        gradients=accumulation_steps * gradients,
        optimizer=optimizer_seconds(numbers / layout.data_parallel_size, gpu),
    )


def _seconds(work: list[Work], phase: str) -> float:
    return sum(each.seconds for each in work if each.phase == phase)


def _recompute_seconds(block: list[Work], layout: Layout) -> float:
    """Kernels of a block that run again in the backward pass: see :class:`~megatron_nepa.models.transformer.Block`."""
    if layout.activation_checkpointing == "none":
        return 0.0
    if layout.activation_checkpointing == "full":
        return _seconds(block, "forward")
    shares = {"SwiGLU": 1.0, "GELU": 1.0, "residual and norm": 0.5}  # one of the two seams
    return sum(shares.get(work.name, 0.0) * work.seconds for work in block if work.phase == "forward")


def find_plans(run: PretrainingConfig, gpus: int, gpu: Gpu) -> list[Plan]:
    """Every layout of the grid, those that fit first and the fastest of them first.

    The grid: tensor-parallel sizes 1 to 8, with and without sequence parallelism; ZeRO 1 and 2; micro-batches that are
    powers of two, or all of a replica's batch; every level of activation checkpointing.

    Raises:
        ConfigError: where no layout of that many GPUs divides the model and the global batch.
    """
    require(gpus >= 1, f"--gpus is {gpus}; it must be at least 1.")
    plans = [predict(run, layout, gpu) for layout in layouts(run, gpus)]
    if not plans:
        raise ConfigError(
            f"no layout divides global_batch_size {run.global_batch_size} over {gpus} GPUs: with tensor-parallel sizes "
            f"up to {GPUS_PER_NODE} the number of replicas must divide the batch; take "
            f"{_possible_gpus(run, gpus)} GPUs."
        )
    return sorted(plans, key=lambda plan: (not plan.fits, -plan.images_per_second if plan.fits else plan.memory.total))


def _possible_gpus(run: PretrainingConfig, gpus: int) -> str:
    """The numbers of GPUs next to the one asked for that some layout serves, one below and one above."""
    most = GPUS_PER_NODE * run.global_batch_size

    def first(numbers: range) -> list[int]:
        return list(islice((number for number in numbers if any(True for _ in layouts(run, number))), 1))

    return one_of(first(range(min(gpus, most), 0, -1)) + first(range(gpus + 1, most + 1)))


def layouts(run: PretrainingConfig, gpus: int) -> Iterator[Layout]:
    """The grid of :func:`find_plans`."""
    for size in (1, 2, 4, 8):
        replicas, rest = divmod(gpus, size)
        if rest or run.global_batch_size % replicas:  # rest is not 0 where replicas is
            continue
        shapes = [stack.model for stack in stacks_of(run.model, Layout(gpus), run.objective)]
        if any(shape.num_heads % size or shape.mlp_hidden_size % size for shape in shapes):
            continue
        batch = run.global_batch_size // replicas
        powers = [2**i for i in range(LARGEST_MICRO_BATCH.bit_length()) if batch % 2**i == 0]
        micro_batches = sorted({*powers, batch} if batch <= LARGEST_MICRO_BATCH else powers)
        for micro_batch in micro_batches:
            for sequence_parallel in (False, True) if size > 1 else (False,):
                for stage in (1, 2):
                    for checkpointing in get_args(ActivationCheckpointing):
                        yield Layout(gpus, size, sequence_parallel, stage, micro_batch, checkpointing)
