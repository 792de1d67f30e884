"""Contenders of the training benchmark: steps that are timed here, or in a process of their own."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_nepa.benchmarks.train.peer import PeerSteps
from megatron_nepa.benchmarks.train.steps import PartClock, TrainingSteps, build_setting
from megatron_nepa.config import ConfigError
from megatron_nepa.training.reporting.device_memory import memory_gb


@dataclass(frozen=True)
class StepTime:
    """The median step of those that were timed.

    Attributes:
        seconds: its duration.
        parts: seconds by part; measured on a step of their own on a GPU, since waiting between parts takes time.
    """

    seconds: float
    parts: dict[str, float]


class Steps(Protocol):
    """Something that can take a training step."""

    device: torch.device

    def step(self, clock: PartClock) -> None:
        """One optimizer step; tells the clock where its parts end."""


class Contender(Protocol):
    """What the benchmark times."""

    def time(self, steps: int) -> StepTime:
        """The median of ``steps`` optimizer steps."""

    def peak_memory_gb(self) -> float:
        """As :func:`megatron_nepa.training.reporting.device_memory.memory_gb`."""

    def close(self) -> None:
        """Let go of what it holds."""


class Local:
    """A contender in this process.

    Args:
        steps: what to time.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def time(self, steps: int) -> StepTime:
        """The median of ``steps`` optimizer steps."""
        device = self.steps.device
        timed = []
        for _ in range(steps):
            clock = PartClock(device)
            start = _settled(device)
            self.steps.step(clock)
            timed.append(StepTime(_settled(device) - start, clock.seconds))
        median = sorted(timed, key=lambda step: step.seconds)[steps // 2]
        if device.type == "cuda":
            clock = PartClock(device, synchronize=True)
            self.steps.step(clock)
            return StepTime(median.seconds, clock.seconds)
        return median

    def communication_seconds(self) -> float:
        """Seconds that collectives take in a step; most of it passes while the step computes."""
        activities = [ProfilerActivity.CPU]
        if self.steps.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            self.steps.step(PartClock(self.steps.device))
        events = profiled.key_averages()
        kernels = sum(event.self_device_time_total for event in events if event.key.startswith("ncclDevKernel"))
        return (kernels + sum(event.cpu_time_total for event in events if event.key.startswith("gloo:"))) / 1e6

    def peak_memory_gb(self) -> float:
        """Peak so far."""
        return memory_gb(self.steps.device)

    def close(self) -> None:
        """Nothing: this process goes on."""


def _settled(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def build_steps(arguments: list[str], accumulation: int) -> TrainingSteps:
    """This project's step, as :func:`~megatron_nepa.benchmarks.train.steps.build_setting` sets it up."""
    return TrainingSteps(build_setting(arguments, accumulation))


def build_peer_steps(arguments: list[str], accumulation: int) -> PeerSteps:
    """The release's step under the same flags."""
    return PeerSteps(build_setting(arguments, accumulation))


def build_compiled_peer_steps(arguments: list[str], accumulation: int) -> PeerSteps:
    """The same with torch.compile."""
    steps = build_peer_steps(arguments, accumulation)
    steps.model.compile()
    return steps


Build = Callable[[list[str], int], Steps]


class Remote:
    """A contender in a process of its own, so that its memory is its own.

    Args:
        build: a module-level function that makes the steps there.
        arguments, accumulation: for ``build``.

    Raises:
        ConfigError: as ``build`` does.
    """

    def __init__(self, build: Build, arguments: list[str], accumulation: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments, accumulation), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def time(self, steps: int) -> StepTime:
        """The median of ``steps`` optimizer steps."""
        self._connection.send(("time", steps))
        answer = self._answer()
        assert isinstance(answer, StepTime)
        return answer

    def peak_memory_gb(self) -> float:
        """Peak so far."""
        self._connection.send(("peak_memory_gb",))
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._connection.close()  # which it takes for the end
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a benchmark process ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, build: Build, arguments: list[str], accumulation: int) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # the parent's group of one: this process makes its own
    try:
        local = Local(build(arguments, accumulation))
        connection.send(None)
        while True:
            method, *values = connection.recv()
            connection.send(getattr(local, method)(*values))
    except EOFError:
        return
    except ConfigError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
