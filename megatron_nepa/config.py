"""Typed configuration of a run: one frozen dataclass per concern, checked when it is built.

A recipe (``megatron_nepa.recipes``) returns a :class:`RunConfig`; the command line replaces single
fields of it. Whatever a field means is said once, in the comment above it: ``--help`` prints
that comment. A value that cannot work raises :class:`ConfigError` with the numbers in the message.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# every image is RGB: the decoder converts grey and CMYK ones
IMAGE_CHANNELS = 3


class ConfigError(ValueError):
    """A setting that cannot work; the message says what is wrong and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def _require_finite(section: Any, name: str) -> None:
    """Refuse a float field that is not a number or infinite."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"{name}{entry.name} is {value}; it must be a finite number.")


@dataclass(frozen=True)
class ModelConfig:
    """The causal Vision Transformer (paper section 3.2; release section 2 where they differ)."""

    # side of the square input image, pixels
    image_size: int = 224
    # side of a square patch, pixels
    patch_size: int = 14
    # width D of the residual stream
    hidden_size: int = 768
    # number of transformer blocks
    num_layers: int = 12
    # attention heads; the head width is hidden_size / num_heads
    num_heads: int = 12
    # feed-forward kind: swiglu (paper) or gelu (release)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    # feed-forward width F
    mlp_hidden_size: int = 2048
    # LayerNorm on each head's q and k: none, plain (no parameters, paper) or affine (a weight per channel)
    qk_norm: Literal["none", "plain", "affine"] = "plain"
    # 2-D rotary position embedding on q and k
    rope: bool = True
    # base of the rotary frequencies
    rope_theta: float = 100.0
    # training-time RoPE augmentation: coordinates times exp(U(-ln r, ln r)); none switches it off (release: 2.0)
    rope_rescale: float | None = None
    # consecutive samples of the run that share one RoPE-rescale draw (release: one per forward call)
    rope_rescale_group: int = 1
    # learned positions added to the trunk's input, never to the target (paper), or none (release)
    position_embedding: Literal["none", "learned"] = "learned"
    # prepend one learned token that is never a target (release)
    bos_token: bool = False
    # initial value of the per-channel branch scale; none removes LayerScale
    layer_scale_init: float | None = 1e-5
    # DropPath rate of the last block; earlier blocks grow linearly from 0
    drop_path: float = 0.0
    # causal attention (pre-training) or bidirectional
    causal: bool = True
    # epsilon of every LayerNorm, added in fp32
    layer_norm_eps: float = 1e-12
    # standard deviation of the initial weights
    init_std: float = 0.02
    # dtype of the residual stream; bf16 rounds away a branch scaled by 1e-5
    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    # keep the patch embedding at its initial value
    freeze_patch_embedding: bool = False

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid_size**2

    @property
    def sequence_length(self) -> int:
        """Tokens T of one image: its patches, and the BOS token where there is one."""
        return self.num_patches + int(self.bos_token)

    def __post_init__(self) -> None:
        _require_finite(self, "model.")
        for name in ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        require(self.mlp_hidden_size >= 1, f"model.mlp_hidden_size is {self.mlp_hidden_size}; it must be at least 1.")
        require(
            self.image_size % self.patch_size == 0,
            f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}; "
            f"the nearest sizes that are: {self.image_size // self.patch_size * self.patch_size} and "
            f"{-(-self.image_size // self.patch_size) * self.patch_size}.",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}.",
        )
        require(
            not self.rope or self.head_size % 4 == 0,
            f"2-D RoPE needs a head width divisible by 4, but hidden_size {self.hidden_size} / num_heads "
            f"{self.num_heads} = {self.head_size}.",
        )
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; it must be positive.")
        require(self.init_std > 0, f"model.init_std is {self.init_std}; it must be positive.")
        require(self.layer_norm_eps >= 0, f"model.layer_norm_eps is {self.layer_norm_eps}; it must not be negative.")
        require(0.0 <= self.drop_path < 1.0, f"model.drop_path is {self.drop_path}; it must lie in [0, 1).")
        require(
            self.rope_rescale is None or self.rope_rescale >= 1.0,
            f"model.rope_rescale is {self.rope_rescale}; it must be none or at least 1.",
        )
        require(
            self.rope_rescale_group >= 1,
            f"model.rope_rescale_group is {self.rope_rescale_group}; it must be at least 1.",
        )
        require(self.num_patches >= 2, "the image must hold at least two patches: there is no next patch to predict.")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The next-embedding objective and its ablations (paper section 3.1, table 1)."""

    # predict the next patch's embedding; off, each patch predicts itself (diverges, table 1a)
    shift: bool = True
    # no gradient through the target; off, the embeddings collapse (table 1a)
    stop_gradient: bool = True
    # share of input patches replaced by a learned mask token; targets stay unmasked (table 1c)
    mask_ratio: float = 0.0

    def __post_init__(self) -> None:
        require(0.0 <= self.mask_ratio < 1.0, f"objective.mask_ratio is {self.mask_ratio}; it must lie in [0, 1).")


@dataclass(frozen=True)
class ParallelConfig:
    """How one replica is spread over ranks; data parallelism takes the ranks that are left."""

    # ranks that share one replica's weights
    tensor_parallel_size: int = 1
    # shard the token rows between the tensor-parallel layers (Megatron's sequence parallelism)
    sequence_parallel: bool = False
    # recompute each block's activations in the backward pass
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(
            self.tensor_parallel_size >= 1,
            f"tensor_parallel_size is {self.tensor_parallel_size}; it must be at least 1.",
        )
        require(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "sequence_parallel shards rows over the tensor-parallel ranks: set tensor_parallel_size to 2 or more, "
            "or drop --sequence_parallel.",
        )

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a model whose heads or widths the tensor-parallel size does not divide."""
        size = self.tensor_parallel_size
        for name in ("num_heads", "mlp_hidden_size"):
            value = getattr(model, name)
            require(
                value % size == 0,
                f"tensor_parallel_size {size} does not divide model.{name} {value}; choose a divisor of both "
                f"num_heads {model.num_heads} and mlp_hidden_size {model.mlp_hidden_size}.",
            )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are augmented (release section 4.1)."""

    # an ImageFolder tree, a flat folder of images or an index; synthetic needs no files; none uses built-in photographs
    path: str | None = None
    # least share of the image's area that a random crop keeps
    crop_scale_min: float = 0.08
    # mirror half of the crops (release; the paper's table lists only the crop)
    horizontal_flip: bool = False
    # decoding threads of each rank
    num_threads: int = 2
    # share of JPEGs that a GPU's hardware decoder takes; the rest go to its CUDA decoder
    hw_decoder_load: float = 0.65
    # an image that cannot be decoded while running: skip shows another in its place, fail ends the run
    on_bad_image: Literal["skip", "fail"] = "skip"
    # share of samples that skip may replace before the run ends
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        require(self.path != "", "data is empty; give a folder (an unset shell variable?).")
        require(
            0.0 < self.crop_scale_min <= 1.0,
            f"data.crop_scale_min is {self.crop_scale_min}; it must lie in (0, 1].",
        )
        require(self.num_threads >= 1, f"data.num_threads is {self.num_threads}; it must be at least 1.")
        require(
            0.0 <= self.hw_decoder_load <= 1.0,
            f"data.hw_decoder_load is {self.hw_decoder_load}; it must lie in [0, 1].",
        )
        require(
            0.0 <= self.max_bad_share <= 1.0,
            f"data.max_bad_share is {self.max_bad_share}; it must lie in [0, 1].",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and the weight average (paper table 4)."""

    # peak learning rate for a global batch of 256: lr = base_lr * global_batch_size / 256
    base_lr: float = 3e-4
    # learning rate at the end of the cosine
    min_lr: float = 0.0
    # warm-up as a share of all steps
    warmup_ratio: float = 0.025
    # decoupled weight decay of matrices; never of biases, norms and LayerScale
    weight_decay: float = 0.05
    # also decay the BOS token (release)
    decay_bos_token: bool = False
    # AdamW's first moment decay
    beta1: float = 0.9
    # AdamW's second moment decay
    beta2: float = 0.95
    # AdamW's epsilon
    eps: float = 1e-8
    # largest global gradient norm; 0 switches clipping off
    clip_grad: float = 1.0
    # decay of the average of the fp32 master weights, updated every step; 0 switches it off
    ema_decay: float = 0.9999
    # ramp the decay as min(ema_decay, (1 + step) / (10 + step)), for short runs
    ema_warmup: bool = False

    def __post_init__(self) -> None:
        _require_finite(self, "optimizer.")
        require(self.base_lr > 0, f"base_lr is {self.base_lr}; it must be positive.")
        require(self.min_lr >= 0, f"optimizer.min_lr is {self.min_lr}; it must not be negative.")
        require(0 <= self.warmup_ratio < 1, f"optimizer.warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1).")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must not be negative.")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must lie in [0, 1).")
        require(self.eps > 0, f"optimizer.eps is {self.eps}; it must be positive.")
        require(self.clip_grad >= 0, f"optimizer.clip_grad is {self.clip_grad}; it must not be negative.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; two runs with equal configs compute equal numbers."""

    # name of the recipe that the other fields started from
    recipe: str = "quickstart"
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # folder of this run's config, metrics, checkpoints and figures
    output_dir: str = "runs/quickstart"
    # optimizer steps of the run; none takes epochs
    steps: int | None = None
    # passes over the data; used where steps is none
    epochs: float | None = None
    # images of one optimizer step, over all ranks and accumulation
    global_batch_size: int = 4096
    # images of one forward pass of one replica
    micro_batch_size: int = 256
    # dtype of weights and branch activations; masters, moments and the stream stay fp32
    dtype: Literal["bf16", "fp32"] = "bf16"
    # seed of the weights, the data order and every other draw
    seed: int = 1337
    # auto continues output_dir's newest checkpoint, none starts afresh, a path continues that checkpoint
    resume: str = "auto"
    # start from the weights of this checkpoint or OUTPUT_DIR, with a fresh optimizer at step 0; none draws them
    init_from: str | None = None
    # which weights init_from takes of a run: its average (ema) or raw
    init_weights: Literal["ema", "raw"] = "ema"
    # steps between checkpoints (one is always written at the end)
    save_every: int = 1000
    # newest checkpoints that are kept; 0 keeps all
    keep_last: int = 3
    # checkpoints of steps that this divides are kept besides the newest; 0 keeps none of them
    keep_every: int = 0
    # steps between copies of the metrics from the device to the log
    log_every: int = 10
    # end the run after this many skipped (non-finite) steps in a row
    max_skipped_steps: int = 10
    # seconds without progress after which the rank that the others wait for is named, with its stack; 0 never
    stall_timeout: float = 300.0
    # Weights & Biases: online, offline or disabled
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    # Weights & Biases project
    wandb_project: str = "megatron_nepa"
    # torch.compile each block (tensor_parallel_size 1)
    compile: bool = False
    # fused operations: auto takes Triton on a GPU and the torch reference elsewhere
    kernels: Literal["auto", "triton", "reference"] = "auto"

    def __post_init__(self) -> None:
        for name in ("output_dir", "resume"):
            require(getattr(self, name) != "", f"{name} is empty; give a folder (an unset shell variable?).")
        for name in ("global_batch_size", "micro_batch_size", "save_every", "log_every", "max_skipped_steps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("keep_last", "keep_every", "stall_timeout"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative.")
        require(
            (self.steps is None) != (self.epochs is None),
            f"set either steps or epochs, not both and not neither: steps is {self.steps} and epochs is {self.epochs}.",
        )
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}; it must be at least 1.")
        require(self.epochs is None or self.epochs > 0, f"epochs is {self.epochs}; it must be positive.")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must lie in [0, 2**63).")
        require(
            not (self.compile and self.parallel.tensor_parallel_size > 1),
            f"--compile serves tensor_parallel_size 1, not {self.parallel.tensor_parallel_size}: drop one of them.",
        )
        require(
            self.init_from is None or self.resume in ("auto", "none"),
            f"--resume {self.resume} continues a run and --init_from {self.init_from} starts one: give one of them.",
        )
        self.parallel.check_model(self.model)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate after linear scaling (paper appendix D)."""
        return self.optimizer.base_lr * self.global_batch_size / 256

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches of one optimizer step on each of ``data_parallel_size`` replicas."""
        per_pass = self.micro_batch_size * data_parallel_size
        require(
            self.global_batch_size % per_pass == 0,
            f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size} "
            f"x data-parallel size {data_parallel_size} = {per_pass}.",
        )
        return self.global_batch_size // per_pass

    def total_steps(self, num_images: int | None) -> int:
        """Optimizer steps of the whole run over a data set of ``num_images`` images (None: endless)."""
        if self.steps is not None:
            return self.steps
        require(num_images is not None, "endless data have no epochs: give --steps.")
        assert self.epochs is not None
        assert num_images is not None
        return max(1, round(self.epochs * num_images / self.global_batch_size))

    def to_dict(self) -> dict[str, Any]:
        """The config as nested plain values, as config.json holds it."""
        return dataclasses.asdict(self)


def override(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """``run`` with the fields in ``values`` ("field" or "section.field") replaced, all checks applied once."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[key] = value
    for section, changes in sections.items():
        top[section] = replace(getattr(run, section), **changes)
    # the length of a run is one of two fields: giving one replaces the recipe's other
    if "steps" in top and "epochs" not in top and top["steps"] is not None:
        top["epochs"] = None
    if "epochs" in top and "steps" not in top and top["epochs"] is not None:
        top["steps"] = None
    return replace(run, **top)
