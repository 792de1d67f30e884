"""What the training benchmark measured, as numbers and as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.benchmarks.train.contender import StepTime


@dataclass
class Contest:
    """One contender's rounds.

    Attributes:
        name: the contender's name.
        images_per_step: over all devices.
        times: one a round.
        peak_memory_gb: of its device's tensors, or of its process on a CPU.
    """

    name: str
    images_per_step: int
    times: list[StepTime] = field(default_factory=list)
    peak_memory_gb: float = 0.0

    @property
    def speeds(self) -> list[float]:
        """Images a second of every round."""
        return [self.images_per_step / time.seconds for time in self.times]

    @property
    def images_per_second(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.speeds)

    def part_ms(self, part: str) -> float:
        """Median milliseconds of a part of the step."""
        return statistics.median(time.parts[part] for time in self.times) * 1e3


@dataclass(frozen=True)
class Count:
    """Rounds by how steady the machine was; only steady ones count, or all where none was.

    Attributes:
        steady: whose probes were all within a tenth of the best.
        dropped: the others.
    """

    steady: int
    dropped: int = 0

    def __str__(self) -> str:
        if not self.steady:
            return f"{self.dropped} rounds, none of them steady"
        return f"{self.steady} rounds" + (f", {self.dropped} more dropped as unsteady" if self.dropped else "")


@dataclass(frozen=True)
class TrainReport:
    """Everything that was measured.

    Attributes:
        command: the command that was given.
        machine: the machine that was measured.
        recipe, dtype: what.
        devices: ranks of the run.
        flops_per_image: model FLOPs of a training step.
        matmul_flops: a large matrix product's FLOP/s on one device, measured in the same call.
        contests: this code as it was asked for first, then those it is compared with.
        rounds: how many were steady.
        ceiling_ms: by part (:mod:`megatron_nepa.benchmarks.train.ceiling`), empty where it was not measured.
        communication_ms: of a step's collectives, most of which overlap with computation; 0 on one device.
    """

    command: str
    machine: Machine
    recipe: str
    dtype: str
    devices: int
    flops_per_image: float
    matmul_flops: float
    contests: list[Contest]
    rounds: Count
    ceiling_ms: dict[str, float]
    communication_ms: float

    @property
    def ceiling_images_per_second(self) -> float | None:
        """Of a step that is its parts alone; None where they were not measured."""
        if not self.ceiling_ms:
            return None
        return self.contests[0].images_per_step / (sum(self.ceiling_ms.values()) / 1e3)

    def flops(self, contest: Contest) -> float:
        """Model FLOP/s of one device."""
        return self.flops_per_image * contest.images_per_second / self.devices

    def ratio(self, contest: Contest) -> float:
        """How many times as fast the first contender is: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.contests[0].speeds, contest.speeds, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with what follows from the measurements."""
        result = asdict(self) | {"rounds": str(self.rounds)}
        for entry, contest in zip(result["contests"], self.contests, strict=True):
            entry |= {
                "images_per_second": contest.images_per_second,
                "tflops_per_device": self.flops(contest) / 1e12,
                "share_of_matmul": self.flops(contest) / self.matmul_flops,
                "first_over_this": self.ratio(contest),
            }
        ceiling = self.ceiling_images_per_second
        result["ceiling_images_per_second"] = ceiling
        result["share_of_ceiling"] = None if ceiling is None else self.contests[0].images_per_second / ceiling
        return result

    def lines(self) -> Iterator[str]:
        """As a table."""
        machine = self.machine
        count = f"{self.devices} x " if self.devices > 1 else ""
        yield f"{count}{machine.device}, {machine.threads} threads, torch {machine.torch_version}, {machine.date}"
        images = self.contests[0].images_per_step
        yield f"{self.recipe} in {self.dtype}, {images} images a step, {self.rounds}"
        yield (
            f"{'':26}{'images/s':>9}{'min':>8}{'max':>8}{'TFLOP/s':>9}{'of matmul':>10}{'peak GB':>9}"
            f"{'data':>8}{'forward':>9}{'backward':>9}{'update':>8}{'first over it':>15}"
        )
        for contest in self.contests:
            yield (
                f"{contest.name:26}{contest.images_per_second:9.2f}{min(contest.speeds):8.2f}{max(contest.speeds):8.2f}"
                f"{self.flops(contest) / 1e12:9.3f}{self.flops(contest) / self.matmul_flops:10.1%}"
                f"{contest.peak_memory_gb:9.2f}{contest.part_ms('data'):8.0f}{contest.part_ms('forward'):9.0f}"
                f"{contest.part_ms('backward'):9.0f}{contest.part_ms('optimizer'):8.0f}{self.ratio(contest):14.2f}x"
            )
        yield "parts in ms; the update is clipping, AdamW and the weight average"
        yield f"a large {self.dtype} matrix product reaches {self.matmul_flops / 1e12:.3f} TFLOP/s"
        if self.devices > 1:
            yield f"collectives take {self.communication_ms:.1f} ms of a step, most of it while the step computes"
        ceiling = self.ceiling_images_per_second
        if ceiling is not None:
            parts = ", ".join(f"{name} {duration:.0f}" for name, duration in self.ceiling_ms.items())
            share = self.contests[0].images_per_second / ceiling
            yield f"every part alone: {ceiling:.2f} images/s, of which the step reaches {share:.2f} (ms: {parts})"
