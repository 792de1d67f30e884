"""What a label's text means, and how the classes of a data set are numbered."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.headers import EXTENSIONS
from megatron_nepa.terminal import counted

Label = int | str | None

# 7, 007, +7, 7.0, .5, 7.000e+00, and what stands for a missing number; "1e3" is as likely a name
_NUMBER = r"(?:[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-][0-9]+)?|(?i:inf|infinity))|(?i:nan))"
_SEVERAL_NUMBERS = re.compile(rf"{_NUMBER}(?:[\s,;]+{_NUMBER})+")
_IMAGE_NAME = re.compile(rf"(?:{'|'.join(map(re.escape, EXTENSIONS))})(?![a-z0-9])", re.IGNORECASE)
_UNSEEN = "\u200b\u200c\u200d\u200e\u200f\u2060"  # that copied text leaves behind
_MOST = 2**31 - 2  # labels are int32, and so is the number of classes


def decode_text(content: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 where a byte-order mark says so; the mark is no part of it, in joined files either.

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
    return text.replace("\ufeff", "")


def read_label(text: str, where: str) -> int | str:
    """A class number, however it is written, or else a class name, as NFC; quotes around either are no part of it.

    Raises:
        ConfigError: a number that no class can have, several numbers, the name of an image, or a name that is no UTF-8.
    """
    text = text.strip().strip(_UNSEEN).strip()
    if len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    if not re.fullmatch(_NUMBER, text):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where} holds a label that is no UTF-8: convert it (iconv -t UTF-8).") from None
        shown = text[:60]
        require(
            not _SEVERAL_NUMBERS.fullmatch(text), f"{where} holds several numbers ({shown}): write one class number."
        )
        require(
            not _IMAGE_NAME.search(text),
            f"{where} holds the label {shown}, which names an image: write a name, a space and a class.",
        )
        return unicodedata.normalize("NFC", text)
    try:
        number = Decimal(text)
    except InvalidOperation:  # an exponent of twenty digits
        number = Decimal("inf")
    require(
        number.is_finite() and 0 <= number <= _MOST and number == number.to_integral_value(),
        f"{where} holds the label {text[:40]}; a class number is whole, from 0 to {_MOST}.",
    )
    return int(number)


def alike(classes: Iterable[str]) -> tuple[str, ...]:
    """A note where the names of two classes look the same: by case, spaces or the form of their letters alone."""
    known: dict[str, str] = {}
    for name in classes:
        other = known.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            return (f"its classes {other!a} and {name!a} look alike: are they one?",)
    return ()


@dataclass
class Tally:
    """How many images have each label, and which has it first; in the order of first images."""

    count: dict[Label, int] = field(default_factory=dict)
    first: dict[Label, str] = field(default_factory=dict)

    def add(self, label: Label, first: str, count: int = 1) -> None:
        """Note images with a label.

        Args:
            label: None where they have none.
            first: what holds the label of the first of them, for messages.
            count: how many.
        """
        self.count[label] = self.count.get(label, 0) + count
        self.first.setdefault(label, first)


def number_classes(
    tally: Tally, source: str, known: tuple[str, ...] | None = None
) -> tuple[dict[Label, int], tuple[str, ...], tuple[str, ...]]:
    """Class numbers of labels: numbers stay what they are, names are numbered as ``known`` says or in sorted order.

    Args:
        tally: of the labels of all images.
        source: what holds them.
        known: class names, by number.

    Returns:
        Each label's class number (-1 for none), class names by number (none where labels are numbers without
        ``known``), and what the user should know.

    Raises:
        ConfigError: numbers among names, or a label that ``known`` does not hold.
    """
    number = next((label for label in tally.count if isinstance(label, int)), None)
    name = next((label for label in tally.count if isinstance(label, str)), None)
    if number is not None and name is not None:
        raise ConfigError(
            f"{source} mixes numbers and names: {tally.first[number]} holds {number} and {tally.first[name]} "
            f"{name!r}; write all labels as class numbers, or all as class names."
        )
    if name is not None:
        classes = known or tuple(sorted(label for label in tally.count if isinstance(label, str)))
        place = {value: i for i, value in enumerate(classes)}
        other = next((label for label in tally.count if label is not None and label not in place), None)
        if other is not None:
            raise ConfigError(f"{tally.first[other]} holds {other!r}, which is none of the {len(classes)} classes.")
        numbers = {label: place[label] if isinstance(label, str) else -1 for label in tally.count}
    else:
        classes = known or ()
        numbers = {label: label if isinstance(label, int) else -1 for label in tally.count}
    found = sorted({value for value in numbers.values() if value >= 0})
    require(
        not classes or not found or found[-1] < len(classes),
        f"{source} holds the label {found[-1] if found else 0}, but there are {len(classes)} class names, from 0.",
    )
    return numbers, classes, (*_notes(tally, found, bool(classes)), *alike(classes))


def _notes(tally: Tally, found: list[int], named: bool) -> tuple[str, ...]:
    notes = []
    without, images = tally.count.get(None, 0), sum(tally.count.values())
    if found and without:
        notes.append(f"{counted(without, 'image')} without a label")
    if found and not named and (missing := found[-1] + 1 - len(found)):
        first = next(i for i, value in enumerate([*found, -1]) if value != i)
        notes.append(f"labels go up to {found[-1]}, and no image has {missing} of them (such as {first})")
    if len(found) == images > 2:
        notes.append("every image has a label of its own: are these class labels?")
    return tuple(notes)
