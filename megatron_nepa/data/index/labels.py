"""Labels that come beside the images rather than as folder names, such as ImageNet's validation ground truth."""

from __future__ import annotations

import csv
import os
import posixpath
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.label_values import Tally, decode_text, number_classes, read_label
from megatron_nepa.data.index.walk import example, is_image
from megatron_nepa.data.remote.folder import RemoteFolder
from megatron_nepa.terminal import counted

_SPACE = "a space"  # the documented delimiter
_DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}
# what a file of labels alone is headed by
_HEADERS = {
    f"{word}{ending}" for word in ("label", "class", "category", "target") for ending in ("", "s", "_id", "_name")
}


def with_labels(listing: DatasetIndex, labels: str | Path, devkit_meta: str | Path | None = None) -> DatasetIndex:
    """A listing with the labels of a text file.

    Args:
        listing: the images.
        labels: one line an image: its label, the lines in the order of the file names; or its name and its label.
            A name is the path below the data folder, or a base name where no two images share it. A label is a class
            number or a class name; classes are numbered in the order of their sorted names.
        devkit_meta: ``meta.mat`` of ImageNet's development kit, which tells what the numbers 1 to 1000 of
            ILSVRC2012_validation_ground_truth.txt mean; the labels become those of the training set's sorted folders.

    Returns:
        The listing; its ``notes`` say by which rule the file was read, where it is not the plain one.

    Raises:
        ConfigError: a file that cannot be read, or in two ways, or labels that do not match the images.
    """
    file = Path(labels)
    try:
        text = decode_text(file.read_bytes(), str(file))
    except OSError as error:
        raise ConfigError(f"the labels in {file} cannot be read: {error.strerror}.") from error
    lines = [
        _Line(number, content.strip())
        for number, content in enumerate(re.split(r"\r\n|\n|\r", text), 1)
        if content.strip()
    ]
    require(bool(lines), f"{file} holds no labels.")
    images = [posixpath.normpath(listing.names[i]) for i in range(len(listing))]
    found, notes = _named(file, lines, images, listing.root) or _in_order(file, lines, images, listing.root)

    values = [read_label(line.text, f"line {line.number} of {file}") for line in found]
    _require_one_spelling(file, found, values)
    known = None
    if devkit_meta is not None:
        wnids = _devkit_classes(Path(devkit_meta))
        require({str(value) for value in values} <= set(wnids), f"{file} holds numbers {devkit_meta} does not explain.")
        values = [wnids[str(value)] for value in values]
        known = tuple(sorted(wnids.values()))
    tally = Tally()
    for line, value in zip(found, values, strict=True):
        tally.add(value, f"line {line.number}")
    numbers, classes, more = number_classes(tally, str(file), known)
    label = np.array([numbers[value] for value in values], np.int32)
    return replace(listing, label=label, classes=classes, notes=(*listing.notes, *notes, *more))


@dataclass(frozen=True)
class _Line:
    number: int  # from 1
    text: str


def _named(
    file: Path, lines: list[_Line], images: list[str], root: Path | RemoteFolder
) -> tuple[list[_Line], tuple[str, ...]] | None:
    """The label of each image from lines of a name and a label, by the one delimiter whose names are images.

    None where no line begins with the name of an image.
    """
    readings = {}
    for delimiter in (_SPACE, "the first space", *_DELIMITERS):
        pairs = [_split(line, delimiter) for line in lines]
        if all(pair is None for pair in pairs):
            continue
        matched = _match(pairs, images, root)
        hits = sum(image is not None for image in matched)
        if hits:
            readings[delimiter] = hits, pairs, matched
    if not readings:
        return None
    most = max(hits for hits, _, _ in readings.values())
    best = {delimiter: reading for delimiter, reading in readings.items() if reading[0] == most}
    delimiter, (_, pairs, matched) = next(iter(best.items()))
    other = next((name for name, reading in best.items() if reading[1:] != (pairs, matched)), None)
    require(
        other is None,
        f"the lines of {file} can be read in two ways, split at {_called(delimiter)} or at {_called(other)}: separate "
        "names and labels by one space.",
    )
    notes = [] if delimiter == _SPACE else [f"its labels file is split at {_called(delimiter)}"]

    label_of: dict[int, _Line] = {}
    unmatched, repeated = [], []
    for line, pair, image in zip(lines, pairs, matched, strict=True):
        if pair is None:
            raise ConfigError(
                f"line {line.number} of {file} ({line.text[:60]}) is no name and label separated by "
                f"{_called(delimiter)}, as the others are."
            )
        if image is None:
            unmatched.append((line, pair[0]))
            continue
        label = _Line(line.number, pair[1])
        known = label_of.setdefault(image, label)
        if known is not label:
            same = known.text == label.text
            require(
                same,
                f"{file} gives {images[image]} the label {known.text} in line {known.number} and {label.text} in line "
                f"{label.number}: keep one.",
            )
            repeated.append(label)
    if unmatched and unmatched[0][0] is lines[0] and not is_image(unmatched[0][1]):
        notes.append(f"line 1 of its labels file ({unmatched.pop(0)[0].text[:60]}) is taken for a header")
    if unmatched:
        lines_of = counted(len(unmatched), "line")
        notes.append(f"{lines_of} of its labels file without an image (line {unmatched[0][0].number})")
    elsewhere = ((_below(pair[0], root), image) for pair, image in zip(pairs, matched, strict=True) if pair)
    other_path = next(
        (name for name, i in elsewhere if i is not None and "/" in name and not _same(name, images[i])), ""
    )
    if other_path:
        notes.append(f"names of its labels file lead elsewhere ({other_path}) and are taken as base names")
    if repeated:
        notes.append(f"{counted(len(repeated), 'line')} of its labels file said twice (line {repeated[0].number})")
    without = [image for i, image in enumerate(images) if i not in label_of]
    require(
        not without,
        f"{file} has no label for {len(without)} of the {counted(len(images), 'image')} of {root} "
        f"({example(without)}): name each by its path below that folder.",
    )
    return [label_of[i] for i in range(len(images))], tuple(notes)


def _called(delimiter: str | None) -> str:
    return _DELIMITERS.get(delimiter or "", delimiter or "")


def _split(line: _Line, delimiter: str) -> tuple[str, str] | None:
    """Name and label of a line, None where it is not two fields."""
    if delimiter in _DELIMITERS:
        try:
            fields = next(csv.reader([line.text], delimiter=delimiter, skipinitialspace=True, strict=True), [])
        except csv.Error:
            return None
    else:
        fields = line.text.rsplit(maxsplit=1) if delimiter == _SPACE else line.text.split(maxsplit=1)
    fields = [field.strip() for field in fields]
    return (fields[0], fields[1]) if len(fields) == 2 and all(fields) else None


def _match(pairs: list[tuple[str, str] | None], images: list[str], root: Path | RemoteFolder) -> list[int | None]:
    """Which image each name is: by its path below root, or by its base name where paths match nothing."""
    names = ["" if pair is None else _below(pair[0], root) for pair in pairs]
    composed = [unicodedata.normalize("NFC", name) for name in images]
    if len(set(composed)) == len(images):  # é is written in one way or the other, by macOS in two letters
        images, names = composed, [unicodedata.normalize("NFC", name) for name in names]
    place = {name: i for i, name in enumerate(images)}
    by_path = [place.get(name) for name in names]
    of_base = Counter(map(posixpath.basename, images))
    base = {posixpath.basename(name): i for name, i in place.items() if of_base[posixpath.basename(name)] == 1}
    paths_match = any(i is not None and "/" in name for i, name in zip(by_path, names, strict=True))
    # a path that leads elsewhere is another image, wherever other paths lead to images
    return [
        i if i is not None or (paths_match and "/" in name) else base.get(posixpath.basename(name))
        for i, name in zip(by_path, names, strict=True)
    ]


def _same(one: str, other: str) -> bool:
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _below(name: str, root: Path | RemoteFolder) -> str:
    """A name as a path below ``root``, as far as it can be told."""
    path = posixpath.normpath(name.replace("\\", "/"))
    for home in _spellings(root):
        if path.startswith(home + "/"):
            return path[len(home) + 1 :]
    return path


def _spellings(root: Path | RemoteFolder) -> tuple[str, ...]:
    if isinstance(root, RemoteFolder):
        return (root.url,)
    return str(root), os.path.realpath(root), root.resolve().name


def _in_order(
    file: Path, lines: list[_Line], images: list[str], root: Path | RemoteFolder
) -> tuple[list[_Line], tuple[str, ...]]:
    """The label of each image from lines of labels, which are in the order of the file names."""
    odd = next((line for line in lines if len(line.text.split()) > 1 or "," in line.text or ";" in line.text), None)
    if odd is not None:
        raise ConfigError(
            f"line {odd.number} of {file} ({odd.text[:60]}) is neither a label alone nor a label behind the name of "
            f"one of the images of {root} (such as {images[0]})."
        )
    require(
        len(lines) == len(images),
        f"{file} holds {counted(len(lines), 'label')} for the {counted(len(images), 'image')} of {root}"
        + (f": is line 1 ({lines[0].text[:60]}) a header?" if len(lines) == len(images) + 1 else "."),
    )
    is_header = lines[0].text.strip('"').casefold() in _HEADERS and all(
        line.text != lines[0].text for line in lines[1:]
    )
    require(
        not is_header,
        f"line 1 of {file} ({lines[0].text}) reads like a header, without which {counted(len(lines) - 1, 'label')} are "
        f"left for the {counted(len(images), 'image')} of {root}: give a name and a label a line.",
    )
    by_path = sorted(range(len(images)), key=images.__getitem__)
    bases = [posixpath.basename(name) for name in images]
    order = sorted(by_path, key=bases.__getitem__)
    way_out = f"give a name and a label a line in {file}."
    require(
        order == by_path or len(set(bases)) == len(bases),
        f"labels in the order of the file names are ambiguous where images of {root} have the same name: {way_out}",
    )
    natural = sorted(order, key=lambda i: _natural(bases[i]))
    first = next((k for k, pair in enumerate(zip(order, natural, strict=True)) if pair[0] != pair[1]), 0)
    require(
        natural == order,
        f"the order of the file names of {root} can be read in two ways, {bases[order[first]]} or "
        f"{bases[natural[first]]} being number {first + 1}: {way_out}",
    )
    found = [lines[0]] * len(images)
    for line, i in zip(lines, order, strict=True):
        found[i] = line
    return found, () if order == by_path else ("labels are taken in the order of the base names",)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2.jpg before 10.jpg, and letters whatever their case, as file managers do."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part]


def _require_one_spelling(file: Path, lines: list[_Line], values: list[int | str]) -> None:
    """Refuse 7 beside 007: one of them is a name, or they are the same class, which nobody can know."""
    spelling: dict[tuple[int | str, bool], _Line] = {}
    for line, value in zip(lines, values, strict=True):
        if isinstance(value, int):
            padded = len(line.text) > 1 and line.text[0] == "0" and line.text[1].isdigit()
            spelling.setdefault((value, padded), line)
            other = spelling.get((value, not padded))
            require(
                other is None,
                f"{file} writes the class number {value} in two ways, {line.text} in line {line.number} and "
                f"{other.text if other else ''} in line {other.number if other else 0}: write one of them.",
            )


def _devkit_classes(meta: Path) -> dict[str, str]:
    """WordNet id of each ILSVRC2012 id, for the classes proper (those without children)."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{meta} is no meta.mat of the ImageNet development kit ({error}).") from error
