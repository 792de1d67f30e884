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

A block keeps 16 n D of its rows (two norms' outputs, two branches, two fp32 streams; 12 n D without LayerScale),
(8 N D + 2 F' N) / t inside its branches, F' being 3 F for SwiGLU and 2 F for GELU, and the statistics of QK-norm and
attention. Selective activation checkpointing drops the stream between the branches (4 n D, or 2 n D without
LayerScale, where the first branch is then kept) and the hidden layer after its activation (2 N F / t), which one block
at a time computes again. Under full activation checkpointing a block keeps its inputs, 6 n D, and one at a time the
rest.

Start-up is not planned: the weights are drawn in fp32, 4 P, before DeepSpeed casts them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig
from megatron_nepa.planning.layout import Layout, count_parameters
from megatron_nepa.training.engine.deepspeed_config import DEFAULT_CONFIG

BF16, FP32 = 2, 4
# overlap_comm fills one while the other is sent
BUCKET_NUMBERS: int = DEFAULT_CONFIG["zero_optimization"]["reduce_bucket_size"]
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
    activations: float = 0
    loss: float = 0
    workspace: float = 0
    buckets: float = 0

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(astuple(self)))


def plan_memory(model: ModelConfig, layout: Layout, accumulation_steps: int, has_average: bool) -> Memory:
    """The largest of three moments: the backward of the last seam and of the last feed-forward layer, and a reduction.

    Args:
        model: the trunk.
        layout: how the run is spread.
        accumulation_steps: micro-batches of a step.
        has_average: whether a weight average is kept.
    """
    numbers = count_parameters(model, layout.tensor_parallel_size).local
    owned = numbers / layout.data_parallel_size
    state = Memory(
        weights=BF16 * numbers, masters=FP32 * owned, moments=2 * FP32 * owned, average=FP32 * owned * has_average
    )
    activations = activation_bytes(model, layout)
    forward = replace(
        state, activations=activations, loss=2 * BF16 * layout.own_rows(model) * model.hidden_size
    )  # prediction and target
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
        end = replace(end, activations=activations * (1 - passed), loss=forward.loss)
    seam = replace(forward, workspace=_seam_bytes(model, layout))
    # by then the first gradient of a matrix is there, and with it ZeRO 2's buckets
    matrices = replace(forward, workspace=_feed_forward_bytes(model, layout), buckets=buckets)
    return max(seam, matrices, end, key=lambda memory: memory.total)


def _largest_matrix(model: ModelConfig, layout: Layout) -> float:
    up = model.mlp_hidden_size * (2 if model.mlp == "swiglu" else 1)
    return model.hidden_size * max(up, 3 * model.hidden_size) / layout.tensor_parallel_size


def activation_bytes(model: ModelConfig, layout: Layout) -> float:
    """What autograd keeps of a micro-batch until its backward pass."""
    rows, width = layout.own_rows(model), model.hidden_size
    pixels = layout.images_per_rank * IMAGE_CHANNELS * model.image_size**2
    images = 2 * BF16 * pixels  # as loaded, and cut into patches
    first_stream = (FP32 + 2 * FP32 / width) * rows * width  # input and statistics of the first norm
    inputs = (FP32 + BF16) * rows * width
    block = block_bytes(model, layout)
    if layout.activation_checkpointing == "full":
        return images + model.num_layers * inputs + block - BF16 * rows * width
    return images + first_stream + model.num_layers * block


def block_bytes(model: ModelConfig, layout: Layout) -> float:
    """What one block keeps: see the table of this module."""
    size, width = layout.tensor_parallel_size, model.hidden_size
    all_rows, own_rows = layout.all_rows(model), layout.own_rows(model)
    branches = 2 * BF16 if model.layer_scale_init is not None else 0
    on_own_rows = (2 * BF16 + 2 * FP32 + branches) * own_rows * width
    hidden_layers = 3 if model.mlp == "swiglu" else 2
    if layout.activation_checkpointing == "selective":
        hidden_layers -= 1
        on_own_rows -= (FP32 if model.layer_scale_init is not None else FP32 - BF16) * own_rows * width
    projections = (3 * width + width + hidden_layers * model.mlp_hidden_size) / size
    statistics = FP32 * model.num_heads / size  # of attention
    if model.qk_norm == "plain":
        statistics += 2 * FP32 * model.num_heads / size
    elif model.qk_norm == "affine":
        statistics += 2 * BF16 * width / size
    return on_own_rows + all_rows * (BF16 * projections + statistics)


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
