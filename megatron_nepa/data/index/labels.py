"""Labels that come beside the images rather than as folder names, such as ImageNet's validation ground truth."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex


def with_labels(listing: DatasetIndex, labels: str | Path, devkit_meta: str | Path | None = None) -> DatasetIndex:
    """A listing with the labels of a text file.

    Args:
        listing: the images.
        labels: one line an image: its label, the lines in the order of the file names; or its name and its label.
            A label is a class number or a class name; classes are numbered in the order of their sorted names.
        devkit_meta: ``meta.mat`` of ImageNet's development kit, which tells what the numbers 1 to 1000 of
            ILSVRC2012_validation_ground_truth.txt mean; the labels become those of the training set's sorted folders.

    Raises:
        ConfigError: a file that cannot be read, or labels that do not match the images.
    """
    file = Path(labels)
    try:
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the labels in {file} cannot be read: {error}.") from error
    require(
        len(lines) == len(listing),
        f"{file} holds {len(lines)} labels for the {len(listing)} images of {listing.root}.",
    )
    names = [os.path.basename(listing.names[i]) for i in range(len(listing))]
    if all(len(line) == 2 for line in lines):
        of_name = {os.path.basename(name): label for name, label in lines}
        unknown = [name for name in names if name not in of_name]
        require(not unknown, f"{file} has no label for {len(unknown)} images, such as {unknown[:1]}.")
        values = [of_name[name] for name in names]
    else:
        require(
            all(len(line) == 1 for line in lines),
            f"the lines of {file} hold neither a label each nor a name and a label.",
        )
        values = [""] * len(names)
        for place, i in enumerate(sorted(range(len(names)), key=names.__getitem__)):
            values[i] = lines[place][0]

    if devkit_meta is not None:
        wnids = _devkit_classes(Path(devkit_meta))
        require(set(values) <= set(wnids), f"{file} holds numbers that {devkit_meta} does not explain.")
        values = [wnids[value] for value in values]
        classes = tuple(sorted(wnids.values()))
    elif all(value.isdigit() for value in values):
        return replace(listing, label=np.array(values, np.int32), classes=())
    else:
        classes = tuple(sorted(set(values)))
    number = {name: i for i, name in enumerate(classes)}
    return replace(listing, label=np.array([number[value] for value in values], np.int32), classes=classes)


def check_same_classes(train: DatasetIndex, validation: DatasetIndex) -> None:
    """Refuse a validation set whose classes are not the training set's.

    Where both name their classes, names and numbers must agree; elsewhere no validation label may lie beyond the
    training labels.

    Raises:
        ConfigError: naming both sides.
    """
    if train.classes and validation.classes:
        missing = sorted(set(train.classes) - set(validation.classes))
        unknown = sorted(set(validation.classes) - set(train.classes))
        differing = [f"{_some(missing)} missing in the latter"] if missing else []
        differing += [f"{_some(unknown)} unknown to the former"] if unknown else []
        require(
            not differing,
            f"the training images in {train.root} have {len(train.classes)} classes and the validation images in "
            f"{validation.root} {len(validation.classes)}: {' and '.join(differing)}.",
        )
        pairs = enumerate(zip(train.classes, validation.classes, strict=True))
        other = [f"class {i} is {a} in the former and {b} in the latter" for i, (a, b) in pairs if a != b]
        require(
            not other,
            f"the training images in {train.root} and the validation images in {validation.root} have the same classes "
            f"under other numbers: {other[0] if other else ''}.",
        )
    else:
        most, found = int(train.label.max()), int(validation.label.max())
        require(
            found <= most,
            f"the validation images in {validation.root} have label {found}, but the training images in {train.root} "
            f"only labels up to {most}.",
        )


def _some(classes: list[str]) -> str:
    return f"class {classes[0]} is" if len(classes) == 1 else f"{len(classes)} classes ({classes[0]}, ...) are"


def _devkit_classes(meta: Path) -> dict[str, str]:
    """WordNet id of each ILSVRC2012 id, for the classes proper (those without children)."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{meta} is no meta.mat of the ImageNet development kit ({error}).") from error
