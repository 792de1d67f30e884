"""A run: everything that defines it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from megatron_nepa.config.checks import divisors, multiples_around, one_of, require, require_finite
from megatron_nepa.config.model import ModelConfig
from megatron_nepa.config.sections import AverageDecay, DataConfig, OptimizerConfig, ParallelConfig


@dataclass(frozen=True)
class RunConfig:
    """What every run has, whatever its task; two runs with equal configs compute equal numbers."""

    # name of the recipe that the other fields started from
    recipe: str = "quickstart"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # folder of this run's config, metrics, checkpoints and figures
    output_dir: str = "runs/quickstart"
    # optimizer steps of the run; none takes epochs
    steps: int | None = None
    # passes over the data, of a mixture over as many samples as its sources have images; used where steps is none
    epochs: float | None = None
    # images of one optimizer step, over all ranks and accumulation
    global_batch_size: int = 4096
    # images of one forward pass of one replica
    micro_batch_size: int = 256
    # dtype of weights and branch activations; masters, moments and the stream stay fp32. auto: bf16 on a GPU and on a
    # CPU with units for it, else fp32; a run that is continued keeps its own
    dtype: Literal["auto", "bf16", "fp32"] = "bf16"
    # seed of the weights, the data order and every other draw
    seed: int = 1337
    # auto continues output_dir's newest checkpoint, none starts afresh, a path continues that checkpoint
    resume: str = "auto"
    # start from the weights of this checkpoint, OUTPUT_DIR or released model's folder, whose trunk's shape replaces the
    # recipe's, with a fresh optimizer at step 0; none draws them
    init_from: str | None = None
    # which weights init_from takes of a run: its average (ema) or raw
    init_weights: Literal["ema", "raw"] = "ema"
    # steps between checkpoints (one is always written at the end)
    save_every: int = 1000
    # newest checkpoints that are kept, besides the best one of a run that is evaluated; 0 keeps all
    keep_last: int = 3
    # checkpoints of steps that this divides are kept besides the newest; 0 keeps none of them
    keep_every: int = 0
    # write a checkpoint beside the steps that follow; the step itself then only pays for a copy in host memory
    async_save: bool = False
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
    # record steps START:STOP, counted from 1 with both ends, in OUTPUT_DIR/profile: a trace and a table of operations
    profile: str | None = None
    # torch.compile each block
    compile: bool = False
    # fused operations: auto takes Triton on a GPU and plain torch elsewhere
    kernels: Literal["auto", "triton", "reference"] = "auto"

    def __post_init__(self) -> None:
        require_finite(self, "")
        for name in ("output_dir", "resume", "init_from"):
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
            self.init_from is None or self.resume in ("auto", "none"),
            f"--resume {self.resume} continues a run and --init_from {self.init_from} starts one: give one of them.",
        )
        self.parallel.check_model(self.model)
        require(
            self.profile is None or len(self.profiled_steps) > 0,
            f"--profile is {self.profile!r}; give it as START:STOP with 1 <= START <= STOP, such as 10:12.",
        )

    @property
    def profiled_steps(self) -> range:
        """Numbers of the optimizer steps that ``profile`` names, counted from 1; empty where it names none."""
        match = re.fullmatch(r"(\d+):(\d+)", self.profile or "")
        if match is None or int(match[1]) < 1:
            return range(0)
        return range(int(match[1]), int(match[2]) + 1)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate after linear scaling (paper appendix D)."""
        return self.optimizer.base_lr * self.global_batch_size / 256

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Widths of all attention heads of what is trained, the trunk's first."""
        return (self.model.head_size,)

    @property
    def trained_dtype(self) -> Literal["auto", "bf16", "fp32"]:
        """Dtype of the weights that are trained, beside their fp32 masters; the trunk computes in ``dtype``."""
        return self.dtype

    def average_decay(self, total_steps: int) -> AverageDecay:
        """How the weight average of a run of ``total_steps`` steps follows the weights."""
        return self.optimizer.average_decay

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches of one optimizer step on each of ``data_parallel_size`` replicas."""
        per_pass = self.micro_batch_size * data_parallel_size
        require(
            self.global_batch_size % per_pass == 0,
            f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size} "
            f"x data-parallel size {data_parallel_size} = {per_pass}: {self._possible_batches(data_parallel_size)}.",
        )
        return self.global_batch_size // per_pass

    def _possible_batches(self, data_parallel_size: int) -> str:
        """Batch sizes near those asked for that ``data_parallel_size`` replicas can share."""
        batches = multiples_around(self.global_batch_size, self.micro_batch_size * data_parallel_size)
        share = max(1, round(self.global_batch_size / data_parallel_size))
        micro_batch = max(size for size in divisors(share) if size <= self.micro_batch_size)
        batch = share * data_parallel_size
        together = "" if batch == self.global_batch_size else f"global_batch_size {batch} and "
        return f"take global_batch_size {one_of(batches)}, or {together}micro_batch_size {micro_batch}"

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

    def fields_by_name(self) -> dict[str, Any]:
        """Every value under the name that :func:`override` takes: "field" or "section.field"."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                flat |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                flat[name] = value
        return flat


Run = TypeVar("Run", bound=RunConfig)


def override(run: Run, values: dict[str, Any]) -> Run:
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
