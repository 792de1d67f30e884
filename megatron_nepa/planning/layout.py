"""A choice of how to spread a run over GPUs, and the sizes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_nepa.config import IMAGE_CHANNELS, ActivationCheckpointing, ModelConfig, ParallelConfig, Run

BF16, FP32 = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Layout:
    """How a run is spread; bf16 weights and activations, fp32 stream, accumulation and optimizer state.

    Attributes:
        gpus: ranks of the whole run.
        tensor_parallel_size: ranks that share one replica.
        sequence_parallel: whether they share its token rows too.
        zero_stage: 1 (ds_configs/zero1.json) or 2 (ds_configs/zero2.json).
        micro_batch_size: images of one forward pass of one replica.
        activation_checkpointing: what of each block is computed again in the backward pass.
    """

    gpus: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 2
    micro_batch_size: int = 1
    activation_checkpointing: ActivationCheckpointing = "none"

    @property
    def data_parallel_size(self) -> int:
        """Replicas."""
        return self.gpus // self.tensor_parallel_size

    @property
    def images_per_rank(self) -> int:
        """Images that a rank decodes and embeds of a micro-batch: its share, or all where it cannot be shared."""
        share, rest = divmod(self.micro_batch_size, self.tensor_parallel_size)
        return self.micro_batch_size if rest else share

    def all_rows(self, model: ModelConfig) -> int:
        """Token rows N of a micro-batch between the parallel layers' collectives, padding included."""
        rows = self.micro_batch_size * model.sequence_length
        return self.own_rows(model) * self.tensor_parallel_size if self.sequence_parallel else rows

    def own_rows(self, model: ModelConfig) -> int:
        """Token rows n that a rank keeps of the residual stream."""
        rows = self.micro_batch_size * model.sequence_length
        return -(-rows // self.tensor_parallel_size) if self.sequence_parallel else rows

    def num_chunks(self, model: ModelConfig) -> int:
        """Chunks in which the ranks of a replica exchange a micro-batch's rows in the forward pass."""
        if self.tensor_parallel_size == 1:
            return 1
        return self._parallel.num_chunks(self.all_rows(model), BF16 * model.hidden_size)

    @property
    def _parallel(self) -> ParallelConfig:
        return ParallelConfig(self.tensor_parallel_size, self.sequence_parallel, self.activation_checkpointing)

    def apply(self, run: Run) -> Run:
        """``run`` spread in this way."""
        return replace(run, parallel=self._parallel, micro_batch_size=self.micro_batch_size, dtype="bf16")

    def describe(self) -> str:
        """In a few words."""
        parts = [f"TP {self.tensor_parallel_size}{' + SP' if self.sequence_parallel else ''}"]
        parts += [f"ZeRO {self.zero_stage}", f"micro-batch {self.micro_batch_size}"]
        if self.activation_checkpointing != "none":
            parts.append(f"{self.activation_checkpointing} activation checkpointing")
        return ", ".join(parts)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers in a rank's share of the weights.

    Attributes:
        split: in matrices and biases that tensor parallelism divides, this rank's part.
        block_replicated: in one block's vectors that every rank holds.
        replicated: in all that every rank holds, the blocks' included.
    """

    split: int
    block_replicated: int
    replicated: int

    @property
    def local(self) -> int:
        """On one rank."""
        return self.split + self.replicated


def count_parameters(model: ModelConfig, tensor_parallel_size: int = 1) -> ParameterCount:
    """Count the numbers that a rank holds of the model's weights (no mask token)."""
    width, hidden, layers = model.hidden_size, model.mlp_hidden_size, model.num_layers
    gates = 2 if model.mlp == "swiglu" else 1
    matrices = 4 * width**2 + (gates + 1) * width * hidden  # qkv and out; up (and gate) and down
    split_biases = 3 * width + gates * hidden
    scales = 2 if model.layer_scale_init is not None else 0
    block = (6 + scales) * width + (2 * model.head_size if model.qk_norm == "affine" else 0)  # 2 biases, 2 norms
    patches = IMAGE_CHANNELS * model.patch_size**2 * width
    positions = model.sequence_length * width if model.position_embedding != "none" else 0
    vectors = (3 + int(model.bos_token)) * width  # patch bias, final norm, BOS token
    return ParameterCount(
        split=layers * (matrices + split_biases) // tensor_parallel_size,
        block_replicated=block,
        replicated=layers * block + patches + positions + vectors,
    )
