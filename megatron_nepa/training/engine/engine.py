"""A DeepSpeed engine with the project's optimizer, weight average and step accounting around it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nepa.checkpoint.format.masters import Masters, find_masters, join_fragments
from megatron_nepa.checkpoint.format.state import TrainState
from megatron_nepa.config import AverageDecay, ConfigError, RunConfig
from megatron_nepa.imports import lasting_imports
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine.average_copy import AverageCopy, ComputesWithAverage
from megatron_nepa.training.engine.ema import ExponentialMovingAverage
from megatron_nepa.training.engine.extensions import build_extensions
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.engine.optimizer import build_optimizer, optimizer_extensions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step.

    Attributes:
        applied: False where a gradient was not finite and the weights stayed as they were.
        grad_norm: global gradient norm before clipping, fp32 scalar on the device.
    """

    applied: bool
    grad_norm: Tensor


class TrainingEngine:
    """Forward, backward and step of a model under DeepSpeed.

    Args:
        model: freshly initialised; DeepSpeed casts it and takes it over.
        run: optimizer settings and dtype.
        ds_config: as :func:`megatron_nepa.training.engine.deepspeed_config.resolve` returns it.
        topology: this rank's place.
        groups: parameter groups of the optimizer, each with a "name"; None takes those of pre-training.
        decay: of the weight average; None takes that of ``run.optimizer``.

    Raises:
        ConfigError: for a set-up that DeepSpeed cannot start.
    """

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        ds_config: dict[str, Any],
        topology: Topology,
        groups: list[dict[str, Any]] | None = None,
        decay: AverageDecay | None = None,
    ) -> None:
        self.run = run
        self.topology = topology
        self.zero_stage: int = ds_config["zero_optimization"]["stage"]
        self.accumulation_steps: int = ds_config["gradient_accumulation_steps"]
        if self.zero_stage == 0:
            # DeepSpeed's plain fp32 path clips without checking or reporting the norm:
            # _step_without_zero does all three
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        model.to(topology.device)
        with quiet_deepspeed():
            missing = build_extensions(optimizer_extensions(topology.device, offload), topology)
        if missing is not None and offload:
            raise ConfigError(f"DeepSpeed's CPU Adam, which offload needs, cannot be built: {missing}.")
        if missing is not None and topology.is_main:
            logger.warning("optimizer: torch's fused AdamW, since DeepSpeed's cannot be built: %s", missing)
        if groups is None:
            groups = LearningRates(run, total_steps=1).groups(model)
        flattened = [list(group["params"]) for group in groups]  # DeepSpeed replaces them by its own
        optimizer = build_optimizer(groups, run.optimizer, topology.device, offload, built=missing is None)
        self.deepspeed = _initialize(model, optimizer, ds_config, topology)
        self.module: nn.Module = self.deepspeed.module
        self.masters: Masters = find_masters(self.deepspeed, self.module)
        self.ema: ExponentialMovingAverage | None = None
        decay = decay or run.optimizer.average_decay
        if decay.decay > 0:
            self.ema = ExponentialMovingAverage(self.masters.flats, decay)
        self.average_copy: AverageCopy | None = None
        if isinstance(self.module, ComputesWithAverage):
            assert self.ema is not None, "the model computes with a weight average that the run does not keep"
            self.average_copy = AverageCopy(
                self.module.trunk, "trunk.", self.masters, self.ema.tensors, flattened, topology
            )
            self.module.targets.attach(self.average_copy)
        self.applied_steps = 0
        self.skipped_in_a_row = 0

    @property
    def train_state(self) -> TrainState:
        """What a checkpoint holds of this engine."""
        return TrainState(self.module, self.masters, self.ema.tensors if self.ema else None, self.topology)

    def forward(self, *inputs: Any) -> Any:
        """Run the model in training mode."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch; ``loss`` is its mean, the engine divides by the accumulation."""
        self.deepspeed.backward(loss)

    def end_micro_batch(self) -> None:
        """Tell DeepSpeed that a micro-batch which is not the step's last one is over."""
        self.deepspeed.step()

    def step(self, learning_rate: float | Mapping[str, float]) -> StepResult:
        """End the last micro-batch of a step: clip, update the weights and their average.

        Args:
            learning_rate: of all parameter groups, or of each by its name.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate[group["name"]] if isinstance(learning_rate, Mapping) else learning_rate
        if self.zero_stage == 0:
            result = self._step_without_zero()
        else:
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()
            applied = self.deepspeed.was_step_applied()
            result = StepResult(applied, torch.as_tensor(norm, dtype=torch.float32, device=self.topology.device))
        if result.applied:
            self.applied_steps += 1
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.applied_steps)
            if self.average_copy is not None:
                self.average_copy.outdate()
        else:
            self.skipped_in_a_row += 1
        return result

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged_weights(self) -> Iterator[None]:
        """Inside the block the model holds its weight average instead of its raw weights; a collective.

        Masters and moments stay as they are. It takes one copy of the model's weights in memory.
        """
        assert self.ema is not None
        trained = {name: param for name, param in self.module.named_parameters() if param.requires_grad}
        raw = {name: param.detach().clone() for name, param in trained.items()}
        for name, param in trained.items():
            fragment, group = self.masters.fragments[name], self.topology.data_group
            param.copy_(join_fragments(param, fragment, self.ema.tensors, group))
        try:
            yield
        finally:
            for name, param in trained.items():
                param.copy_(raw[name])

    def _step_without_zero(self) -> StepResult:
        norm = self._gradient_norm()
        applied = bool(torch.isfinite(norm))
        gradients = [param.grad for param in self.module.parameters() if param.grad is not None]
        if not applied:
            for param in self.module.parameters():
                param.grad = None
        elif self.run.optimizer.clip_grad > 0:
            torch._foreach_mul_(gradients, (self.run.optimizer.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        self.deepspeed.step()
        return StepResult(applied, norm)

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        tensor = self.topology.tensor
        squares = [
            param.grad.float().square().sum()
            for param in self.module.parameters()
            if param.grad is not None and (tensor.rank == 0 or getattr(param, "tensor_model_parallel", False))
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.topology.device)
        if tensor.size > 1:
            dist.all_reduce(total, group=tensor.group)
        return total.sqrt()


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], topology: Topology
) -> Any:
    with quiet_deepspeed():
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        # its reduction through shared memory serves inference alone: compiling it takes half a minute, and every rank
        # that opens it leaves 64 MB in /dev/shm
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        try:
            engine, _, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, mpu=topology.mpu(), dist_init_required=False
            )
        except (NotImplementedError, ValueError, AssertionError, DeepSpeedConfigError, ZeRORuntimeException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"DeepSpeed refuses this configuration: {reason}") from error
    return engine


def import_deepspeed() -> None:
    """Import DeepSpeed and what every engine of it imports; call it before the model is built.

    Every engine imports its Muon, whose functions are given to torch.compile as they are defined. No run uses them:
    here they stay as they are written, and torch's compiler, a second and 600 modules, is left to ``--compile``.
    """
    own = os.environ.get("TORCHDYNAMO_DISABLE")
    with lasting_imports("deepspeed"), quiet_deepspeed():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        try:
            with contextlib.suppress(ImportError):  # as where DeepSpeed imports it
                import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        finally:
            os.environ.pop("TORCHDYNAMO_DISABLE")
            if own is not None:
                os.environ["TORCHDYNAMO_DISABLE"] = own


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Import and start DeepSpeed with its own warnings and errors, but not its start-up chatter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("deepspeed is not installed: pip install deepspeed.")
    import deepspeed.utils

    logger = deepspeed.utils.logger
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(max(level, logging.WARNING))
