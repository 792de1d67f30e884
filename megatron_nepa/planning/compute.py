"""Time of the kernels by roofline: the longer of FLOPs over the matrix rate and bytes over the memory's bandwidth."""

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
from megatron_nepa.planning.cluster import Gpu
from megatron_nepa.planning.layout import BF16, Layout
from megatron_nepa.planning.stacks import stacks_of

# what reads and writes an element: AdamW gradient, master, moments in and out (28 bytes), average (12), gradient norm
# and clipping (12), bf16 weights (6)
OPTIMIZER_BYTES = 58
# ZeRO 2, a micro-batch: gradient into the bucket (4), scaled (4), copied (4), to fp32 (6)
# ZeRO 1: gradient to fp32 (6) and added (12)
GRADIENT_BYTES = 18


@dataclass(frozen=True)
class Work:
    """Kernels of one kind in one pass over one micro-batch, on one rank.

    Attributes:
        name: the operation's name.
        phase: forward, or which of the two products of its backward ("input_gradient", "weight_gradient"), or
            "backward" for what has no weight.
        flops: floating-point operations, in matrix products only.
        bytes: least traffic with the device's memory.
        seconds: by roofline.
    """

    name: str
    phase: Literal["forward", "input_gradient", "weight_gradient", "backward"]
    flops: float
    bytes: float
    seconds: float


def block_work(model: ModelConfig, layout: Layout, gpu: Gpu) -> list[Work]:
    """The kernels of one block, forward and backward."""
    size, width, hidden = layout.tensor_parallel_size, model.hidden_size, model.mlp_hidden_size
    rows, own_rows = layout.all_rows(model), layout.own_rows(model)
    gates = 2 if model.mlp == "swiglu" else 1
    work = []
    work += _product("qkv", rows, width, 3 * width / size, gpu)
    work += _product("out", rows, width / size, width, gpu)
    work += _feed_forward(model, layout, gpu)
    work += _attention(model, layout, gpu)

    heads = BF16 * rows * width / size  # bytes of one [B, T, H, d] tensor
    inside = BF16 * rows * hidden / size  # of the hidden layer
    stream = BF16 * own_rows * width  # of one bf16 [n, D] tensor
    affine = model.qk_norm == "affine"
    if model.qk_norm != "none" or model.rope:
        work += _fused("QK-norm and RoPE", (6 if affine else 4) * heads, 6 * heads, gpu)
    work += _fused("residual and norm", 2 * 6 * stream, 2 * 9 * stream, gpu)
    work += _fused("bias gradients", 0, 3 * heads + gates * inside, gpu)
    if layout.sequence_parallel and layout.num_chunks(model) > 1:
        # the outputs of qkv and up, and the rows that out and down take and give
        joined = 4 * heads + (gates + 1) * inside + 2 * stream
        work += _fused("cutting and joining rows", 2 * joined, 0, gpu)
    return work


def _feed_forward(model: ModelConfig, layout: Layout, gpu: Gpu) -> list[Work]:
    rows, width, hidden = layout.all_rows(model), model.hidden_size, model.mlp_hidden_size / layout.tensor_parallel_size
    inside, gated = BF16 * rows * hidden, model.mlp == "swiglu"
    return [
        *_product("up", rows, width, (2 if gated else 1) * hidden, gpu),
        *_product("down", rows, hidden, width, gpu),
        *(_fused("SwiGLU", 3 * inside, 5 * inside, gpu) if gated else _fused("GELU", 2 * inside, 3 * inside, gpu)),
    ]


def outer_work(
    model: ModelConfig, layout: Layout, gpu: Gpu, objective: ObjectiveConfig = NepaObjective()
) -> list[Work]:
    """Patch embedding, first norms and loss of one micro-batch, and what an objective adds beside blocks."""
    match objective:
        case JepaObjective():
            return _outer_work_of_jepa(model, layout, gpu, objective)
        case AimObjective() | MaeObjective():
            return _outer_work_of_pixels(model, layout, gpu, objective)
    stream = BF16 * layout.own_rows(model) * model.hidden_size
    pixels = IMAGE_CHANNELS * model.patch_size**2
    rows = layout.images_per_rank * model.num_patches
    embedding = _product("patch embedding", rows, pixels, model.hidden_size, gpu)
    embedding = [work for work in embedding if work.phase != "input_gradient"]  # images have none
    return [
        *embedding,
        *_fused("first norm", 7 * stream, 7 * stream, gpu),
        *_fused("loss", 2 * stream, 3 * stream, gpu),
    ]


def _outer_work_of_jepa(model: ModelConfig, layout: Layout, gpu: Gpu, objective: JepaObjective) -> list[Work]:
    context, predictor, _ = stacks_of(model, layout, objective)
    pixels, width = IMAGE_CHANNELS * model.patch_size**2, model.hidden_size
    images = layout.images_per_rank
    num_context = context.model.sequence_length
    embedding = _product("patch embedding", images * num_context, pixels, width, gpu)
    embedding = [work for work in embedding if work.phase != "input_gradient"]
    embedding += _product("targets' patch embedding", images * model.num_patches, pixels, width, gpu)[:1]
    context_rows = layout.own_rows(context.model)
    sequences = predictor.layout.own_rows(predictor.model)
    predicted = sequences * (1 - num_context / predictor.model.sequence_length)
    narrow = predictor.model.hidden_size
    norms = 7 * BF16 * (context_rows * width + sequences * narrow)
    targets_norm = 7 * BF16 * layout.own_rows(model) * width
    return [
        *embedding,
        *_product("predictor's first layer", context_rows, width, narrow, gpu),
        *_product("predictor's last layer", predicted, narrow, width, gpu),
        *_fused("first norms", norms + targets_norm, norms, gpu),
        *_fused("loss", 18 * predicted * width, 14 * predicted * width, gpu),
    ]


def _outer_work_of_pixels(
    model: ModelConfig, layout: Layout, gpu: Gpu, objective: AimObjective | MaeObjective
) -> list[Work]:
    pixels, width = IMAGE_CHANNELS * model.patch_size**2, model.hidden_size
    stacks = stacks_of(model, layout, objective)
    first, last = stacks[0].model, stacks[-1].model
    embedded = layout.images_per_rank * (first.sequence_length - int(model.bos_token))
    embedding = _product("patch embedding", embedded, pixels, width, gpu)
    found = [work for work in embedding if work.phase != "input_gradient"]
    norms = sum(7 * BF16 * layout.own_rows(stack.model) * stack.model.hidden_size for stack in stacks)
    rows = layout.own_rows(last)
    if isinstance(objective, AimObjective):
        layer = [replace(work, name=f"head's {work.name}") for work in _feed_forward(model, layout, gpu)]
        stream = BF16 * rows * width
        layer += _fused("head's residual and norm", 6 * stream, 9 * stream, gpu)
        found += objective.head_layers * layer
        norms += 7 * stream
    else:
        found += _product("decoder's first layer", layout.own_rows(first), width, last.hidden_size, gpu)
        # joined, put in their places, with positions, as the stream
        tokens = rows * last.hidden_size
        found += _fused("decoder's tokens", 18 * tokens, 14 * tokens, gpu)
    return [
        *found,
        *_product("pixels' layer", rows, last.hidden_size, pixels, gpu),
        *_fused("first norms", norms, norms, gpu),
        # the targets are cut, widened and normalised: as many bytes again as the squared error moves forward
        *_fused("loss", 2 * 30 * rows * pixels, 38 * rows * pixels, gpu),
    ]


def gradient_seconds(numbers: float, gpu: Gpu) -> float:
    """DeepSpeed's own passes over the gradients of one micro-batch, of a rank's ``numbers``."""
    return GRADIENT_BYTES * numbers / gpu.memory_bandwidth


def optimizer_seconds(owned: float, gpu: Gpu) -> float:
    """Norm, clipping, AdamW, weight average and the new bf16 weights of the numbers that a rank owns."""
    return OPTIMIZER_BYTES * owned / gpu.memory_bandwidth


def _product(name: str, rows: float, inner: float, outer: float, gpu: Gpu) -> list[Work]:
    """[rows, inner] times [inner, outer], and the two products of its backward pass."""
    flops = 2 * rows * inner * outer
    moved = BF16 * (rows * inner + inner * outer + rows * outer)
    seconds = max(flops / gpu.matmul_flops, moved / gpu.memory_bandwidth)
    return [
        Work(name, "forward", flops, moved, seconds),
        Work(name, "input_gradient", flops, moved, seconds),
        Work(name, "weight_gradient", flops, moved, seconds),
    ]


def _attention(model: ModelConfig, layout: Layout, gpu: Gpu) -> list[Work]:
    """Two products forward and five backward over the pairs that are kept; it reads and writes qkv and its output."""
    tokens = model.sequence_length
    pairs = tokens * (tokens + 1) / 2 if model.causal else tokens**2
    width = model.hidden_size / layout.tensor_parallel_size
    product = 2 * layout.micro_batch_size * pairs * width
    tensor = BF16 * layout.micro_batch_size * tokens * width
    forward, backward = (2 * product, 4 * tensor), (5 * product, 8 * tensor)
    return [
        Work("attention", phase, flops, moved, max(flops / gpu.attention_flops, moved / gpu.memory_bandwidth))  # type: ignore[arg-type]
        for phase, (flops, moved) in (("forward", forward), ("backward", backward))
    ]


def _fused(name: str, forward: float, backward: float, gpu: Gpu) -> list[Work]:
    return [
        Work(name, "forward", 0, forward, forward / gpu.memory_bandwidth),
        Work(name, "backward", 0, backward, backward / gpu.memory_bandwidth),
    ]
