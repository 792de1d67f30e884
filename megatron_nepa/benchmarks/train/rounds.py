"""Rounds of contenders, each in a fresh process, between probes that tell a steady machine from one in a bad spell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_nepa.benchmarks.train.contender import Contender, StepTime
from megatron_nepa.benchmarks.train.report import Contest, Count
from megatron_nepa.kernels.launching.timing import milliseconds

WARMUP_STEPS = 3  # the first allocates moments and compiles, and the next two settle
TOLERANCE = 0.1  # how much slower than the best a probe of a steady round may be
MAX_ROUNDS = 2  # rounds at most, as a multiple of those that are asked for
COPY_BYTES, PRODUCT_SIZE, REPEATS = 2**28, {"cpu": 1024, "cuda": 8192}, 5

Start = Callable[[], Contender]


@dataclass(frozen=True)
class Probe:
    """What the machine can do at a moment: milliseconds of a copy in memory, and of a matrix product in fp32."""

    copy_ms: float
    product_ms: float

    @classmethod
    def now(cls, device: torch.device) -> Probe:
        """Probe ``device``: a tenth of a second or so."""
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        matrix = torch.ones(PRODUCT_SIZE[device.type], PRODUCT_SIZE[device.type], device=device)
        return cls(
            milliseconds(lambda: target.copy_(source), device, REPEATS, warmup=1),
            milliseconds(lambda: matrix @ matrix, device, REPEATS, warmup=1),
        )


@dataclass(frozen=True)
class Round:
    """Every contender once.

    Attributes:
        times: by contender.
        peaks: of memory in GB, by contender.
        probes: before the first contender and after each.
    """

    times: Mapping[str, StepTime]
    peaks: Mapping[str, float]
    probes: tuple[Probe, ...]


def steady_rounds(rounds: list[Round]) -> list[Round]:
    """Those whose every probe is at most a tenth slower than the best of all rounds."""
    probes = [probe for each in rounds for probe in each.probes]
    copy, product = min(probe.copy_ms for probe in probes), min(probe.product_ms for probe in probes)

    def is_steady(probe: Probe) -> bool:
        limit = 1 + TOLERANCE
        return probe.copy_ms <= limit * copy and probe.product_ms <= limit * product

    return [each for each in rounds if all(map(is_steady, each.probes))]


def compete(
    starts: Mapping[str, Start], images_per_step: int, rounds: int, timed_steps: int, probe: Callable[[], Probe]
) -> tuple[list[Contest], Count]:
    """Time every contender in each round, starting with another one each time, until enough rounds were steady.

    Args:
        starts: by contender, what starts it anew.
        images_per_step: of every contender.
        rounds: steady ones that are wanted; at most twice as many are made.
        timed_steps: of each contender in a round, after those that warm it up.
        probe: of the machine as it is now.

    Returns:
        What was measured in the steady rounds, or in all where none was steady; and how many were.
    """
    made: list[Round] = []
    while len(made) < MAX_ROUNDS * rounds and (not made or len(steady_rounds(made)) < rounds):
        made.append(_round(starts, len(made) % len(starts), timed_steps, probe))
    steady = steady_rounds(made)
    contests = [
        Contest(
            name,
            images_per_step,
            [each.times[name] for each in steady or made],
            max(each.peaks[name] for each in made),
        )
        for name in starts
    ]
    return contests, Count(len(steady), len(made) - len(steady))


def _round(starts: Mapping[str, Start], first: int, timed_steps: int, probe: Callable[[], Probe]) -> Round:
    names = list(starts)
    times: dict[str, StepTime] = {}
    peaks: dict[str, float] = {}
    probes = [probe()]
    for name in names[first:] + names[:first]:
        contender = starts[name]()
        try:
            contender.time(WARMUP_STEPS)
            times[name] = contender.time(timed_steps)
            peaks[name] = contender.peak_memory_gb()
        finally:
            contender.close()
        probes.append(probe())
    return Round(times, peaks, tuple(probes))
