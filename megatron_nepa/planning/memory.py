"""Memory of one GPU, by part, at the moment when it is largest.

With P the numbers of the rank's weights, R = P over the data-parallel ranks, D and F the widths, H the heads, t the
tensor-parallel size, N the micro-batch's token rows and n those of them that the rank keeps (N / t under sequence
parallelism, else N), in bytes:

| part | ZeRO 2 | ZeRO 1 |
|---|---|---|
| weights, bf16 | 2 P | 2 P |
| gradients, bf16 | in the buckets | 2 P |
| accumulation, fp32 | 4 R | 4 P |
| masters, moments, average, fp32 | 4 R, 8 R, 4 R | the same |
| buckets | 2 of ``reduce_bucket_size`` in bf16 | none |
| JEPA: copy of the trunk's average, bf16 | 2 T, T the trunk's numbers | the same |

A block keeps 16 n D of its rows (two norms' outputs, two branches, two fp32 streams; 12 n D without LayerScale),
(8 N D + 2 F' N) / t inside its branches, F' being 3 F for SwiGLU and 2 F for GELU, and the statistics of QK-norm and
attention. Selective activation checkpointing drops the stream between the branches (4 n D, or 2 n D without
LayerScale, where the first branch is then kept) and the hidden layer after its activation (2 N F / t), which one block
at a time computes again. Under full activation checkpointing a block keeps its inputs, 6 n D, and one at a time the
rest.

JEPA keeps the blocks of its context and of its predictor, whose sequences are counted at the largest target block; its
loss has 18 bytes a channel of a predicted patch (a prediction in bf16, it and its target in fp32 and normalised, and
the distance). Its largest moment may be the pass of the targets' encoder, which keeps nothing but holds one block's
temporaries, 16 n D + 4 N F / t, beside all else. The copy is gathered where it lies: a step needs no more for it.

MAE keeps the blocks of its visible patches and of its decoder, and the output of both, 2 n D. AIM keeps the trunk's and
its head's layers, each 6 n D and the hidden layers, and where it has a prefix a mask of 2 bytes a pair of tokens in
every block. Their backward pass begins with the loss, PIXEL_BYTES a predicted number; then the layer that predicts
pixels has the first matrix gradient, so that ZeRO 2's buckets are there at the seam.

Start-up is not planned: the weights are drawn in fp32, 4 P, before DeepSpeed casts them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from megatron_nepa.config import (
    IMAGE_CHANNELS,
    AimObjective,
    JepaObjective,
    MaeObjective,
    ModelConfig,
    NepaObjective,
    ObjectiveConfig,
)
from megatron_nepa.planning.layout import BF16, FP32, Layout
from megatron_nepa.planning.stacks import Stack, count_all, count_copied, count_trained, stacks_of
from megatron_nepa.training.engine.deepspeed_config import DEFAULT_CONFIG

# overlap_comm fills one while the other is sent
BUCKET_NUMBERS: int = DEFAULT_CONFIG["zero_optimization"]["reduce_bucket_size"]
# of the squared error of a predicted number: it, its gradient and the factors of that, in fp32
PIXEL_BYTES = 20
JOINED_NUMBERS = 500_000_000  # DeepSpeed's own bucket of ZeRO 1 with fp32 accumulation


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part at the peak of a step."""

    weights: float = 0
    gradients: float = 0
    accumulation: float = 0
    masters: float = 0
    moments: float = 0
    average: float = 0
    average_copy: float = 0
    activations: float = 0
    loss: float = 0
    workspace: float = 0
    buckets: float = 0

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(astuple(self)))


def plan_memory(
    model: ModelConfig,
    layout: Layout,
    accumulation_steps: int,
    has_average: bool,
    objective: ObjectiveConfig = NepaObjective(),
) -> Memory:
    """The largest of three moments: the backward of the last seam and of the last feed-forward layer, and a reduction.

    JEPA has a fourth, the pass of the targets' encoder, and those that predict pixels that of the loss.

    Args:
        model: the trunk.
        layout: how the run is spread.
        accumulation_steps: micro-batches of a step.
        has_average: whether a weight average is kept.
        objective: what the trunk is trained for.
    """
    held = count_all(model, layout.tensor_parallel_size, objective).local
    numbers = count_trained(model, layout.tensor_parallel_size, objective)
    owned = numbers / layout.data_parallel_size
    state = Memory(
        weights=BF16 * held, masters=FP32 * owned, moments=2 * FP32 * owned, average=FP32 * owned * has_average
    )
    stacks = stacks_of(model, layout, objective)
    trained = [stack for stack in stacks if stack.trained]
    activations = _image_bytes(model, layout, objective) + sum(_stack_bytes(stack) for stack in trained)
    again = max(_recomputed_bytes(stack) for stack in trained)  # one block at a time
    head = 0.0
    loss: float = 2 * BF16 * layout.own_rows(model) * model.hidden_size  # prediction and target
    match objective:
        case JepaObjective():
            copy = BF16 * count_copied(model, layout.tensor_parallel_size)
            state = replace(state, average_copy=copy)
            predicted_rows = _predicted_rows(stacks[1], objective)
            loss = 18 * predicted_rows * model.hidden_size
            # inputs of the predictor's first layer and of its last
            activations += _output_bytes(stacks[0]) + BF16 * predicted_rows * stacks[1].model.hidden_size
        case MaeObjective():
            loss = sum(_output_bytes(stack) for stack in stacks)
        case AimObjective(head_layers=layers):
            head = _head_bytes(model, layout, layers)
    forward = replace(state, activations=activations + max(head, again), loss=loss)
    if layout.zero_stage == 1:
        # the last micro-batch's gradients stay until the next has made its own
        kept = BF16 * numbers if accumulation_steps > 1 else 0
        forward = replace(forward, accumulation=FP32 * numbers, gradients=kept)
        buckets = 0
        # both parameter groups' gradients are joined for one all-reduce where that is not too large
        joined = FP32 * numbers if numbers <= JOINED_NUMBERS else 0
        end = replace(state, accumulation=FP32 * numbers, gradients=BF16 * numbers, workspace=joined)
    else:
        # made when a bucket is first reduced
        forward = replace(forward, accumulation=FP32 * owned if accumulation_steps > 1 else 0)
        buckets = 2 * BF16 * BUCKET_NUMBERS
        # of a full bucket, or of a matrix that is larger than one, the largest part with one owner is copied, to bf16
        # and to fp32; the matrix's own gradient lies beside it
        matrix = _largest_matrix(model, layout)
        copies = (BF16 + FP32) * min(max(BUCKET_NUMBERS, matrix), owned)
        copies += BF16 * matrix if matrix > BUCKET_NUMBERS else 0
        passed = min(1, BUCKET_NUMBERS / numbers)  # share of the backward pass, and of the activations
        end = replace(state, accumulation=FP32 * owned, workspace=copies, buckets=buckets)
        end = replace(end, activations=forward.activations * (1 - passed), loss=forward.loss)
    last = trained[-1]  # whose backward pass is the first
    seam = replace(forward, workspace=_seam_bytes(last.model, last.layout))
    others = []
    if isinstance(objective, JepaObjective):  # the prediction, and what the context's rows were made of, wait
        waiting = BF16 * _predicted_rows(stacks[1], objective) * model.hidden_size + _output_bytes(stacks[0])
        temporaries = _untrained_bytes(stacks[2])
        others.append(replace(forward, activations=activations, loss=waiting, workspace=temporaries))
    if isinstance(objective, AimObjective | MaeObjective):
        predicted = layout.own_rows(model) * IMAGE_CHANNELS * model.patch_size**2
        others.append(replace(forward, activations=activations + head, workspace=PIXEL_BYTES * predicted))
        seam = replace(seam, buckets=buckets)
    # by then the first gradient of a matrix is there, and with it ZeRO 2's buckets
    matrices = forward
    if isinstance(objective, JepaObjective):  # of its loss the two fp32 tensors of the health figures are left
        matrices = replace(matrices, loss=8 / 18 * forward.loss)
    matrices = replace(matrices, workspace=_feed_forward_bytes(last.model, last.layout), buckets=buckets)
    return max(seam, matrices, end, *others, key=lambda memory: memory.total)


def _image_bytes(model: ModelConfig, layout: Layout, objective: ObjectiveConfig) -> float:
    """Of the images as loaded, and of the patches that are embedded and trained."""
    share = 1.0
    if isinstance(objective, JepaObjective):
        share = objective.num_context(model.num_patches) / model.num_patches
    elif isinstance(objective, MaeObjective):
        share = objective.num_visible(model.num_patches) / model.num_patches
    return (1 + share) * BF16 * layout.images_per_rank * IMAGE_CHANNELS * model.image_size**2


def _output_bytes(stack: Stack) -> float:
    """Of what its last norm makes."""
    return BF16 * stack.layout.own_rows(stack.model) * stack.model.hidden_size


def _head_bytes(model: ModelConfig, layout: Layout, layers: int) -> float:
    """What AIM's head keeps: the input of each layer, the stream before each norm, and the hidden layers."""
    rows = layout.own_rows(model) * model.hidden_size
    return (layers * (FP32 + BF16) + FP32) * rows + layers * _hidden_bytes(model, layout)


def _hidden_bytes(model: ModelConfig, layout: Layout) -> float:
    """Of the hidden layers that a feed-forward layer keeps."""
    kept = 3 if model.mlp == "swiglu" else 2
    kept -= int(layout.activation_checkpointing == "selective")
    return BF16 * layout.all_rows(model) * kept * model.mlp_hidden_size / layout.tensor_parallel_size


def _predicted_rows(predictor: Stack, objective: JepaObjective) -> float:
    model = predictor.model
    block = objective.most_target_patches(model.grid_size, model.grid_size)
    return predictor.layout.own_rows(model) * block / model.sequence_length


def _untrained_bytes(stack: Stack) -> float:
    """Temporaries of a stack that keeps nothing, at the end of a block's feed-forward layer.

    The embedded rows, the block's inputs, the stream and norm between its branches, the second branch, and the hidden
    layer before and after activation.
    """
    model, layout = stack.model, stack.layout
    hidden = 2 * BF16 * layout.all_rows(model) * model.mlp_hidden_size / layout.tensor_parallel_size
    return (2 * (FP32 + BF16) + 2 * BF16) * layout.own_rows(model) * model.hidden_size + hidden


def _largest_matrix(model: ModelConfig, layout: Layout) -> float:
    up = model.mlp_hidden_size * (2 if model.mlp == "swiglu" else 1)
    return model.hidden_size * max(up, 3 * model.hidden_size) / layout.tensor_parallel_size


def _stack_bytes(stack: Stack) -> float:
    """What autograd keeps of a stack until its backward pass."""
    model, layout = stack.model, stack.layout
    rows, width = layout.own_rows(model), model.hidden_size
    first_stream = (FP32 + 2 * FP32 / width) * rows * width  # input and statistics of the first norm
    inputs = (FP32 + BF16) * rows * width
    pairs = layout.micro_batch_size * model.sequence_length**2 * stack.masked
    if layout.activation_checkpointing == "full":
        return model.num_layers * inputs + pairs
    return first_stream + model.num_layers * (block_bytes(model, layout) + BF16 * pairs) + pairs


def _recomputed_bytes(stack: Stack) -> float:
    """Of a block that is computed again from its inputs, beyond these; 0 where none is."""
    model, layout = stack.model, stack.layout
    if layout.activation_checkpointing != "full":
        return 0.0
    pairs = layout.micro_batch_size * model.sequence_length**2 * stack.masked
    return block_bytes(model, layout) + BF16 * pairs - BF16 * layout.own_rows(model) * model.hidden_size


def block_bytes(model: ModelConfig, layout: Layout) -> float:
    """What one block keeps: see the table of this module."""
    size, width = layout.tensor_parallel_size, model.hidden_size
    all_rows, own_rows = layout.all_rows(model), layout.own_rows(model)
    branches = 2 * BF16 if model.layer_scale_init is not None else 0
    on_own_rows = (2 * BF16 + 2 * FP32 + branches) * own_rows * width
    if layout.activation_checkpointing == "selective":
        on_own_rows -= (FP32 if model.layer_scale_init is not None else FP32 - BF16) * own_rows * width
    projections = 4 * width / size
    statistics = FP32 * model.num_heads / size  # of attention
    if model.qk_norm == "plain":
        statistics += 2 * FP32 * model.num_heads / size
    elif model.qk_norm == "affine":
        statistics += 2 * BF16 * width / size
    return on_own_rows + all_rows * (BF16 * projections + statistics) + _hidden_bytes(model, layout)


def _seam_bytes(model: ModelConfig, layout: Layout) -> float:
    """Gradients of the last norm (bf16), of the stream (fp32) and of the branch (bf16)."""
    return (2 * BF16 + FP32) * layout.own_rows(model) * model.hidden_size


def _feed_forward_bytes(model: ModelConfig, layout: Layout) -> float:
    """Temporaries of the last feed-forward layer's backward pass, beyond what the seam freed before.

    The down projection makes the hidden layer's gradient and its weight's; the up projection frees the hidden layer
    and makes its own. Under sequence parallelism the rows are whole there: the branch's gradient in the first, the
    layer's input and its gradient in the second. Selective activation checkpointing has made the hidden layer again.
    """
    size, width, hidden = layout.tensor_parallel_size, model.hidden_size, model.mlp_hidden_size
    rows = layout.all_rows(model)
    whole = BF16 * rows * width if layout.sequence_parallel else 0
    gates = 2 if model.mlp == "swiglu" else 1
    down = whole + BF16 * hidden * (rows + width) / size
    up = 2 * whole + BF16 * hidden * (gates * width - rows) / size
    again = BF16 * rows * hidden / size if layout.activation_checkpointing == "selective" else 0
    return max(down, up) + again
