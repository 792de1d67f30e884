"""What a label's text means, and how the classes of a data set are numbered."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require
from megatron_nepa.terminal import counted

# 7, 007, +7, 7.0, .5, 7.000e+00; "1e3" is as likely a name
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-][0-9]+)?")
_MOST = 2**31 - 2  # labels are int32, and so is the number of classes


def decode_text(content: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 where a byte-order mark says so; the mark is no part of it.

    Bytes that are no UTF-8 come back as surrogates, as in the names of files.

    Raises:
        ConfigError: text of another encoding.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16") if utf16 else content.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    require("\0" not in text, f"{where} is no text in UTF-8: convert it (iconv -t UTF-8).")
    return text


def read_label(text: str, where: str) -> int | str:
    """A class number, however it is written, or else a class name.

    Raises:
        ConfigError: a number that no class can have, or a name that is no UTF-8.
    """
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where} holds a label that is no UTF-8: convert it (iconv -t UTF-8).") from None
        return text
    number = Decimal(text)
    require(
        0 <= number <= _MOST and number == number.to_integral_value(),
        f"{where} holds the label {text[:40]}; a class number is whole, from 0 to {_MOST}.",
    )
    return int(number)


def number_classes(
    values: Sequence[int | str | None],
    where: Callable[[int], str],
    source: str,
    known: tuple[str, ...] | None = None,
) -> tuple[npt.NDArray[np.int32], tuple[str, ...], tuple[str, ...]]:
    """Class numbers of labels: numbers stay what they are, names are numbered as ``known`` says or in sorted order.

    Args:
        values: of every image; None where it has no label.
        where: what holds the label of image i, for messages.
        source: what holds all labels.
        known: class names, by number.

    Returns:
        Labels [n] (-1 where there is none), class names by number (none where labels are numbers without ``known``),
        and what the user should know.

    Raises:
        ConfigError: numbers among names, or a label that ``known`` does not hold.
    """
    number = next((i for i, value in enumerate(values) if isinstance(value, int)), None)
    name = next((i for i, value in enumerate(values) if isinstance(value, str)), None)
    if number is not None and name is not None:
        raise ConfigError(
            f"{source} mixes numbers and names: {where(number)} holds {values[number]} and {where(name)} "
            f"{values[name]!r}; write all labels as class numbers, or all as class names."
        )
    if name is not None:
        classes = known or tuple(sorted({value for value in values if isinstance(value, str)}))
        place = {value: i for i, value in enumerate(classes)}
        other = next((i for i, value in enumerate(values) if isinstance(value, str) and value not in place), None)
        if other is not None:
            raise ConfigError(f"{where(other)} holds {values[other]!r}, which is none of the {len(classes)} classes.")
        labels = np.array([place[value] if isinstance(value, str) else -1 for value in values], np.int32)
    else:
        classes = known or ()
        labels = np.array([-1 if value is None else value for value in values], np.int32)
    found = np.unique(labels[labels >= 0])
    require(
        not classes or not len(found) or int(found[-1]) < len(classes),
        f"{source} holds the label {found[-1] if len(found) else 0}, but there are {len(classes)} class names, from 0.",
    )
    return labels, classes, _notes(labels, found, bool(classes))


def _notes(labels: npt.NDArray[np.int32], found: npt.NDArray[np.int32], named: bool) -> tuple[str, ...]:
    notes = []
    without = int((labels < 0).sum())
    if len(found) and without:
        notes.append(f"{counted(without, 'image')} without a label")
    if len(found) and not named and (missing := int(found[-1]) + 1 - len(found)):
        first = int(np.flatnonzero(np.append(found, -1) != np.arange(len(found) + 1))[0])
        notes.append(f"labels go up to {found[-1]}, and no image has {missing} of them (such as {first})")
    if len(found) == len(labels) > 2:
        notes.append("every image has a label of its own: are these class labels?")
    return tuple(notes)
