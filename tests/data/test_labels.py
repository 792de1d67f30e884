"""A validation set must have the classes of the training set, under the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.agreement import check_same_classes
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames


def labelled(root: str, labels: list[int], classes: tuple[str, ...] = ()) -> DatasetIndex:
    """An index of images that need not exist."""
    sizes = np.ones(len(labels), np.int32)
    return DatasetIndex(
        Path(root), PackedNames.pack(map(str, labels)), sizes, sizes, np.array(labels, np.int32), classes
    )


def test_equal_classes_pass() -> None:
    """By name; by number where a side has no names, and then a class may be missing from the validation set."""
    train = labelled("/train", [0, 1, 2], ("ant", "bee", "cow"))
    check_same_classes(train, labelled("/val", [2, 1], ("ant", "bee", "cow")))
    check_same_classes(labelled("/train", [0, 1], ("0", "1")), labelled("/val", [1, 1]))
    check_same_classes(labelled("/train", [0, 5]), labelled("/val", [5]))


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (("ant", "cow"), [1], r"/train have 3 classes .* /val 2: class bee is missing in the latter\.$"),
        (("ant", "bee", "cow", "dog"), [1], "4: class dog is unknown to the former"),
        (("ant", "dog", "cow"), [1], "class bee is missing in the latter and class dog is unknown to the former"),
        (("cow",), [0], r"1: 2 classes \(ant, \.\.\.\) are missing in the latter"),
        (("ant", "cow", "bee"), [1], "other numbers: class 1 is bee in the former and cow in the latter"),
        ((), [2], r"/train have names \(ant, bee, cow, ...\) and those of /val only numbers"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], labels: list[int], message: str) -> None:
    """One sentence names both sides and what differs."""
    train = labelled("/train", [0, 1, 2], ("ant", "bee", "cow"))
    with pytest.raises(ConfigError, match=message) as error:
        check_same_classes(train, labelled("/val", labels, classes))
    assert "\n" not in str(error.value)


def test_other_numbers_are_refused() -> None:
    """Numbers counted from 0 are not those counted from 1, in either set; names may have another order than numbers."""
    for train, validation in (([0, 1, 2], [1, 2, 3]), ([1, 2, 3], [0, 1, 2])):
        with pytest.raises(ConfigError, match="do both count classes from the same number"):
            check_same_classes(labelled("/train", train), labelled("/val", validation))
    folders = tuple(sorted(map(str, range(11))))  # "10" stands before "2"
    with pytest.raises(ConfigError, match="only numbers, which may mean other classes"):
        check_same_classes(labelled("/train", [*range(11)], folders), labelled("/val", [*range(11)]))
    with pytest.raises(ConfigError, match="label 2, but the training images in /train only labels up to 1"):
        check_same_classes(labelled("/train", [0, 1], ("0", "1")), labelled("/val", [2]))
