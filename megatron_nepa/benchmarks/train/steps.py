"""Training steps to be timed: this project's, part by part."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_nepa.config import PretrainingConfig, override
from megatron_nepa.data.decoding.timed_settings import settle
from megatron_nepa.data.loaders.pretraining import SYNTHETIC
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import ORDER_VERSION
from megatron_nepa.job import start_job
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.tasks.pretraining import PretrainingTask
from megatron_nepa.training.engine.compiled_blocks import compile_blocks
from megatron_nepa.training.engine.deepspeed_config import resolve
from megatron_nepa.training.engine.engine import TrainingEngine, import_deepspeed
from megatron_nepa.training.task import Loader

PARTS = ("data", "forward", "backward", "optimizer")  # the last with clipping and the weight average
LEARNING_RATE = 1e-4  # of every timed step: it costs the same whatever it is


@dataclass
class PartClock:
    """Adds up the seconds of a step's parts.

    Attributes:
        device: waited for at the end of each part where ``synchronize`` says so, else a GPU's parts are only the time
            to launch them.
        seconds: by part.
    """

    device: torch.device
    synchronize: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _last: float = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._last = self._now()

    def end(self, part: str) -> None:
        """What passed since the last call was ``part``."""
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self.synchronize and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Setting:
    """A run as the benchmark takes it.

    Attributes:
        run: recipe and flags; synthetic images unless ``--data`` names others.
        ds_config: DeepSpeed's config, as DeepSpeed gets it.
        kernels: the run's implementations of the fused operations.
        topology: this process's place.
    """

    run: PretrainingConfig
    ds_config: dict[str, object]
    kernels: Kernels
    topology: Topology


def build_setting(arguments: Sequence[str], accumulation: int = 1) -> Setting:
    """A run from the flags of ``pretrain_nepa.py``; joins the process group.

    Args:
        arguments: the flags; ``--global_batch_size`` does not count.
        accumulation: micro-batches of a step.

    Raises:
        ConfigError: as ``pretrain_nepa.py`` would.
    """
    job = start_job(arguments, "", PRETRAINING_RECIPES)
    run, data_size = job.run, job.topology.data_size
    if run.data.path is None:
        run = override(run, {"data.path": SYNTHETIC})
    run = replace(run, global_batch_size=run.micro_batch_size * data_size * accumulation)
    return Setting(run, resolve(run, job.ds_config, data_size), job.kernels, job.topology)


def loader_of(task: PretrainingTask, run: PretrainingConfig, topology: Topology) -> Loader:
    """The images of ``run`` from its first sample on, decoded as a run would; every rank calls it."""
    feed = Feed.of(run, topology, DTYPES[run.dtype], 0, Path(os.devnull), ORDER_VERSION)
    return task.build_loader(feed, settle(run.data, task.decoded(), feed, topology.host_group))


class TrainingSteps:
    """This project's step, without log, metrics and checkpoints.

    Args:
        setting: the run.
    """

    def __init__(self, setting: Setting) -> None:
        run, topology = setting.run, setting.topology
        import_deepspeed()
        self.device, self.task = topology.device, PretrainingTask(run, topology)
        self.engine = TrainingEngine(self.task.build_model(setting.kernels), run, setting.ds_config, topology)
        if run.compile:
            compile_blocks(self.engine.module)
        self.loader = loader_of(self.task, run, topology)

    def step(self, clock: PartClock) -> None:
        """One optimizer step."""
        engine = self.engine
        clock.start()
        for micro_batch in range(engine.accumulation_steps):
            batch = next(self.loader)
            clock.end("data")
            loss, _ = self.task.forward(engine, batch)
            clock.end("forward")
            engine.backward(loss)
            clock.end("backward")
            if micro_batch < engine.accumulation_steps - 1:
                engine.end_micro_batch()
        engine.step(LEARNING_RATE)
        clock.end("optimizer")
