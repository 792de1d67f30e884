"""Refusing a setting that cannot work, in one sentence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; the message says what is wrong and what to do."""


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
