"""How ``--data`` names several sets and their shares: in its own text, or in a JSON file.

``a.index=0.7,b.index=0.3``, or a file ``mixture.json`` with ``{"a.index": 0.7, "b.index": 0.3}``, whose paths are
relative to its folder. Names may hold "=" and ",": what exists under the whole text is that one set, and of several
readings the one whose paths exist is taken.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.label_values import decode_text
from megatron_nepa.data.remote.folder import is_url

BLOCK = 10_000  # samples in which the shares hold exactly
_SUM_TOLERANCE = 1e-3  # of the shares' sum: thirds are written as 0.333
_EXAMPLE = "a.index=0.7,b.index=0.3"


class Part(NamedTuple):
    """One source as the user names it."""

    path: str
    share: float


def read_mixture(text: str) -> tuple[Part, ...] | None:
    """The sources that ``--data`` names, two or more, with positive shares whose sum is 1.

    Args:
        text: the flag's value.

    Returns:
        None where the text names one set, there or not.

    Raises:
        ConfigError: shares that cannot be, a source named twice, a text that can be read in several ways, or a file
            that holds no mixture; the sentence names the source.
    """
    path = Path(text)
    if path.suffix == ".json" and os.path.isfile(text):
        return _checked(_of_file(path), str(path))
    if os.path.lexists(text):
        return None
    named = _of_text(text)
    return None if named is None else _checked(named, "--data")


def samples_per_block(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """Of every :data:`BLOCK` samples, how many each source gives: its share, rounded so that the sum is exact.

    Raises:
        ConfigError: a share that is less than one sample.
    """
    exact = [part.share * BLOCK for part in parts]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])  # a stable sort: ties by place
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    for part, count in zip(parts, counts, strict=True):
        require(
            count > 0,
            f"the share {part.share:g} of {part.path} is less than one of {BLOCK:,} samples: give it at least "
            f"{1 / BLOCK:g}, or leave it out.",
        )
    return tuple(counts)


def _of_text(text: str) -> list[tuple[str, Any]] | None:
    if "=" not in text:
        pieces = text.split(",")
        require(
            len(pieces) < 2 or not all(map(os.path.lexists, pieces)),
            f"--data {text}: {pieces[0]} has no share; several sets are given as {_EXAMPLE}.",
        )
        return None
    readings = list(_readings(text))
    readings = [reading for reading in readings if all(_number(share) is not None for _, share in reading)] or readings
    require(
        len(readings) < 2,
        f"--data {text} can be read in {len(readings)} ways whose paths all exist: name the sources in a JSON file.",
    )
    if readings:
        return list(readings[0])
    pieces = text.split(",")
    if all(_number(piece.rpartition("=")[2]) is None for piece in pieces if "=" in piece):
        return None  # a path that happens to hold "=", and is missing
    for piece in pieces:
        require(piece != "", f"--data {text} has an empty entry: give every source as PATH=SHARE.")
        require("=" in piece, f"--data {text}: {piece} has no share; every source has one, as in {_EXAMPLE}.")
        require(not piece.startswith("="), f"--data {text}: {piece} has no path; give every source as PATH=SHARE.")
    return [(path, share) for path, _, share in (piece.rpartition("=") for piece in pieces)]


def _readings(text: str) -> Iterator[list[tuple[str, str]]]:
    """Every way to read a text as PATH=SHARE,... in which all paths exist."""
    for end in re.finditer(r"=([^=,]*)(,|$)", text):
        path = text[: end.start()]
        if not os.path.lexists(path):
            continue
        if not end[2]:
            yield [(path, end[1])]
        else:
            yield from ([(path, end[1]), *rest] for rest in _readings(text[end.end() :]))


def _of_file(path: Path) -> list[tuple[str, Any]]:
    try:
        named = json.loads(decode_text(path.read_bytes(), f"the mixture {path}"), object_pairs_hook=list)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the mixture {path} cannot be read as JSON: {error}.") from None
    require(
        isinstance(named, list) and all(isinstance(entry, tuple) for entry in named),
        f'{path} holds no mixture: give an object such as {{"a.index": 0.7, "b.index": 0.3}}.',
    )
    for name, _ in named:
        require(_is_path(name), f"{path} names the source {name!a}, which is no path.")
    return [(name if is_url(name) else str(path.parent / name), share) for name, share in named]


def _checked(named: list[tuple[str, Any]], source: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    for path, given in named:
        share = _number(given)
        require(share is not None, f"{source}: the share of {path} is {given!r}; it must be a number.")
        assert share is not None
        require(
            math.isfinite(share) and share > 0,
            f"{source}: the share of {path} is {share:g}; it must be positive (leave out what is not to be shown).",
        )
        parts.append(Part(path, share))
    require(
        len(parts) > 1,
        f"{source} gives {parts[0].path if parts else 'nothing'} a share, and no other source: a mixture has two or "
        f"more, as in {_EXAMPLE}.",
    )
    places = [os.path.realpath(part.path) for part in parts]
    for i, part in enumerate(parts):
        require(places[i] not in places[:i], f"{source} names {part.path} twice: add its shares up.")
    total = math.fsum(part.share for part in parts)
    fitting = ", ".join(f"{part.path}={part.share / total:.4g}" for part in parts)
    require(
        abs(total - 1) <= _SUM_TOLERANCE,
        f"{source}: the shares add up to {total:g}, not to 1; in the same proportions they are {fitting}.",
    )
    return tuple(Part(part.path, part.share / total) for part in parts)


def _is_path(name: str) -> bool:
    """Whether a system can be asked for it: not nothing, no end of a string inside, no half letters."""
    try:
        return name != "" and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _number(given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return None
    try:
        return float(given)
    except (ValueError, OverflowError):
        return None
