"""Refusing a setting that cannot work, in one sentence, and finding one that does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; the message says what is wrong and what to do."""


class RankConfigError(ConfigError):
    """What only this rank has met, an image of its share for one: it speaks for itself, the others wait for it."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_finite(section: Any, name: str) -> None:
    """Refuse a float field that is not a number or infinite."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"{name}{entry.name} is {value}; it must be a finite number.")


def divisors(*numbers: int) -> list[int]:
    """The common divisors of positive numbers, smallest first."""
    common = math.gcd(*numbers)
    small = [divisor for divisor in range(1, math.isqrt(common) + 1) if common % divisor == 0]
    return sorted({*small, *(common // divisor for divisor in small)})


def multiples_around(value: int, unit: int, least: int = 1) -> list[int]:
    """The multiples of ``unit``, at least ``least`` times it, next to ``value``: one below and one above."""
    times = value // unit
    return sorted({max(least, times) * unit, max(least, times + 1) * unit})


def one_of(values: Iterable[int | str]) -> str:
    """Values as a choice, for a message: "1, 2 or 4"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
