"""Whether two sets mean the same classes by their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nepa.config import require
from megatron_nepa.data.index.dataset_index import DatasetIndex


def check_same_classes(train: DatasetIndex, validation: DatasetIndex) -> None:
    """Refuse a validation set whose classes are not the training set's.

    Where both name their classes, names and numbers must agree. Names and mere numbers agree only where the names are
    the numbers, and numbers alone where the training images have every label of the validation images.

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
        names, numbers = (train, validation) if train.classes else (validation, train)
        require(
            names_are_numbers(names.classes),
            f"the classes of {names.root} have names ({', '.join(names.classes[:3])}, ...) and those of {numbers.root} "
            "only numbers, which may mean other classes: index both sets with class names, or both with numbers.",
        )
        known, asked = train.found_labels, validation.found_labels
        unseen = np.setdiff1d(asked, known)
        require(
            not len(unseen) or bool(train.classes),
            f"the validation images in {validation.root} have label {unseen[0] if len(unseen) else 0}, but the "
            f"training images in {train.root}, with labels {known[0]} to {known[-1]}, have none of "
            "it: do both count classes from the same number?",
        )
        require(
            not train.classes or int(asked[-1]) < len(train.classes),
            f"the validation images in {validation.root} have label {asked[-1]}, but the training images "
            f"in {train.root} only labels up to {len(train.classes) - 1}.",
        )


def compare_with_head(
    source: str, trained: Sequence[str] | None, classes: Sequence[str], images: str, remedy: str
) -> str | None:
    """Refuse images whose classes are not those that a head tells apart.

    Args:
        source: that holds the head.
        trained: its class names, by number; () where they are numbers alone, None where nothing is known of them.
        classes: of the images, likewise.
        images: which they are, in words.
        remedy: what to do.

    Returns:
        The sentence for a head of which nothing is known; None elsewhere.

    Raises:
        ConfigError: naming both sides.
    """
    if trained is None:
        if not classes:
            return None
        return f"{source} does not name its classes: its output 0 is taken for {classes[0]}, and so on in order."
    if not (trained and classes):
        names = trained or classes
        require(
            names_are_numbers(names),
            f"the classes of {source if trained else images} have names ({', '.join(names[:3])}, ...) and those of "
            f"{images if trained else source} only numbers, which may mean other classes: {remedy}.",
        )
        return None
    differing = [(i, *pair) for i, pair in enumerate(zip(trained, classes, strict=False)) if pair[0] != pair[1]]
    require(
        len(trained) == len(classes) and not differing,
        f"{source} was trained to tell {len(trained)} classes apart and {images} have {len(classes)}"
        + (f"; number {differing[0][0]} is {differing[0][1]} there, {differing[0][2]} here" if differing else "")
        + f": {remedy}.",
    )
    return None


def names_are_numbers(classes: Sequence[str]) -> bool:
    """Whether every class name is the class's number (also where there are no names)."""
    return all(name.isascii() and name.isdigit() and int(name) == i for i, name in enumerate(classes))


def _some(classes: list[str]) -> str:
    return f"class {classes[0]} is" if len(classes) == 1 else f"{len(classes)} classes ({classes[0]}, ...) are"
