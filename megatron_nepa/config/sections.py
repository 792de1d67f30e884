"""What every task configures besides its model: the objective, the grid, the data, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_nepa.config.checks import divisors, one_of, require, require_finite
from megatron_nepa.config.model import ModelConfig

MOST_INITIAL_SHARE = 0.01  # of an average that is taken for one of trained weights
MAX_THREADS = 1024  # of one rank's decoder, which ends the process where the system refuses one
ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How one replica is spread over ranks; data parallelism takes the ranks that are left."""

    # ranks that share one replica's weights
    tensor_parallel_size: int = 1
    # shard the token rows between the tensor-parallel layers (Megatron's sequence parallelism)
    sequence_parallel: bool = False
    # computed again in the backward pass: none; selective, what is cheap (a residual sum and norm, SwiGLU or GELU);
    # full, whole blocks (so does the bare flag)
    activation_checkpointing: ActivationCheckpointing = "none"
    # rows that tensor-parallel ranks exchange in the forward pass travel in chunks of at least this many bytes, each
    # behind the product of another
    chunk_bytes: int = 2**26

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "chunk_bytes"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        require(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "sequence_parallel shards rows over the tensor-parallel ranks: set tensor_parallel_size to 2 or more, "
            "or drop --sequence_parallel.",
        )

    def num_chunks(self, num_rows: int, row_bytes: int) -> int:
        """Chunks in which the ranks exchange ``num_rows`` rows of ``row_bytes`` bytes each."""
        return max(1, min(num_rows // self.tensor_parallel_size, num_rows * row_bytes // self.chunk_bytes))

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a model whose heads or widths the tensor-parallel size does not divide."""
        size = self.tensor_parallel_size
        for name in ("num_heads", "mlp_hidden_size"):
            value = getattr(model, name)
            require(
                value % size == 0,
                f"tensor_parallel_size {size} does not divide model.{name} {value}: take tensor_parallel_size "
                f"{one_of(divisors(model.num_heads, model.mlp_hidden_size))}, which divide both num_heads "
                f"{model.num_heads} and mlp_hidden_size {model.mlp_hidden_size}.",
            )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are augmented."""

    # an ImageFolder tree, a flat folder of images or an index (of shards behind URLs, too); for pre-training several
    # and their shares, as in a.index=0.7,b.index=0.3 or a JSON file; synthetic needs no files; none uses built-in
    # photographs
    path: str | None = None
    # least share of the image's area that a random crop keeps
    crop_scale_min: float = 0.08
    # mirror half of the crops (release; the paper's table lists only the crop)
    horizontal_flip: bool = False
    # decoding threads of each rank, on a CPU as many more resize; none times some when training starts, else takes 2
    num_threads: int | None = None
    # share of JPEGs for a GPU's hardware decoder, the rest go to its CUDA decoder; none: likewise, else 0.65
    hw_decoder_load: float | None = None
    # an image that cannot be decoded while running: skip shows another in its place, fail ends the run
    on_bad_image: Literal["skip", "fail"] = "skip"
    # share of the images that may be bad, ten more aside, before skip ends the run too
    max_bad_share: float = 0.01
    # seconds for which a read from a bucket or web server is tried again; then the run saves a checkpoint and ends
    remote_patience: float = 300.0
    # folder of this machine that keeps what is read from a bucket or web server, for later epochs and other ranks
    remote_cache: str | None = None
    # size that the cache is held to, in GB
    remote_cache_gb: float = 100.0

    def __post_init__(self) -> None:
        require(self.path != "", "data is empty; give a folder (an unset shell variable?).")
        require(
            0.0 < self.crop_scale_min <= 1.0,
            f"data.crop_scale_min is {self.crop_scale_min}; it must lie in (0, 1].",
        )
        require(
            self.num_threads is None or 1 <= self.num_threads <= MAX_THREADS,
            f"data.num_threads is {self.num_threads}; it must lie in 1 to {MAX_THREADS}.",
        )
        require(
            self.hw_decoder_load is None or 0.0 <= self.hw_decoder_load <= 1.0,
            f"data.hw_decoder_load is {self.hw_decoder_load}; it must lie in [0, 1].",
        )
        require(
            0.0 <= self.max_bad_share <= 1.0,
            f"data.max_bad_share is {self.max_bad_share}; it must lie in [0, 1].",
        )
        require_finite(self, "data.")
        require(self.remote_patience > 0, f"data.remote_patience is {self.remote_patience}; it must be positive.")
        require(self.remote_cache_gb > 0, f"data.remote_cache_gb is {self.remote_cache_gb}; it must be positive.")
        require(self.remote_cache != "", "data.remote_cache is empty; give a folder (an unset shell variable?).")


@dataclass(frozen=True)
class AverageDecay:
    """How an average forgets the weights it began with.

    Attributes:
        decay: share of the average that stays in an update; 0 where there is no average.
        warmup: whether it is at most (1 + step) / (10 + step), so that the average follows runs of any length.
        rise_steps: updates over which the decay rises linearly from ``decay`` to 1 (JEPA); None keeps it.
    """

    decay: float
    warmup: bool = False
    rise_steps: int | None = None

    def at(self, step: int) -> float:
        """The decay of the update after applied step number ``step``, counted from 1."""
        decay = self.decay
        if self.rise_steps is not None:
            decay += (1 - decay) * min((step - 1) / self.rise_steps, 1.0)
        return min(decay, (1 + step) / (10 + step)) if self.warmup else decay

    def initial_share(self, steps: int) -> float:
        """The share of the average, after ``steps`` updates, that is still the weights it began with."""
        if not self.warmup and self.rise_steps is None:
            return self.decay**steps
        share = 1.0
        for step in range(1, steps + 1):
            share *= self.at(step)
            if share < 1e-6:  # with the warm-up after some 40 steps
                break
        return share

    def is_young(self, steps: int) -> bool:
        """Whether the average after ``steps`` updates is still so near to its beginning that it says little."""
        return self.decay > 0 and self.initial_share(steps) > MOST_INITIAL_SHARE


Decay = Literal["cosine", "linear"]  # shape of a learning rate's fall


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule and the weight average (paper table 4)."""

    # adamw, or lars for linear probes, which trains without ZeRO
    name: Literal["adamw", "lars"] = "adamw"
    # peak learning rate for a global batch of 256: lr = base_lr * global_batch_size / 256
    base_lr: float = 3e-4
    # learning rate at the end of the fall
    min_lr: float = 0.0
    # shape of the fall from the peak to min_lr
    decay: Decay = "cosine"
    # warm-up as a share of all steps
    warmup_ratio: float = 0.025
    # weight decay of matrices, AdamW's decoupled; never of biases, norms and LayerScale
    weight_decay: float = 0.05
    # also decay the BOS token (release)
    decay_bos_token: bool = False
    # AdamW's first moment decay, LARS's momentum
    beta1: float = 0.9
    # AdamW's second moment decay
    beta2: float = 0.95
    # AdamW's epsilon
    eps: float = 1e-8
    # largest global gradient norm; 0 switches clipping off
    clip_grad: float = 1.0
    # decay of the average of the fp32 master weights, updated every step; 0 switches it off
    ema_decay: float = 0.9999
    # ramp the decay as min(ema_decay, (1 + step) / (10 + step)), so that the average follows runs of any length
    ema_warmup: bool = False

    def __post_init__(self) -> None:
        require_finite(self, "optimizer.")
        require(self.base_lr > 0, f"base_lr is {self.base_lr}; it must be positive.")
        require(self.min_lr >= 0, f"optimizer.min_lr is {self.min_lr}; it must not be negative.")
        require(0 <= self.warmup_ratio < 1, f"optimizer.warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1).")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must not be negative.")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must lie in [0, 1).")
        require(self.eps > 0, f"optimizer.eps is {self.eps}; it must be positive.")
        require(self.clip_grad >= 0, f"optimizer.clip_grad is {self.clip_grad}; it must not be negative.")

    @property
    def average_decay(self) -> AverageDecay:
        """How the weight average follows the weights."""
        return AverageDecay(self.ema_decay, self.ema_warmup)
