"""A validation set must have the classes of the training set, under the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.labels import check_same_classes


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
    check_same_classes(train, labelled("/val", [1, 1]))
    check_same_classes(labelled("/train", [0, 5]), labelled("/val", [5]))


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (("ant", "cow"), [1], r"/train have 3 classes .* /val 2: class bee is missing in the latter\.$"),
        (("ant", "bee", "cow", "dog"), [1], "4: class dog is unknown to the former"),
        (("ant", "dog", "cow"), [1], "class bee is missing in the latter and class dog is unknown to the former"),
        (("cow",), [0], r"1: 2 classes \(ant, \.\.\.\) are missing in the latter"),
        (("ant", "cow", "bee"), [1], "other numbers: class 1 is bee in the former and cow in the latter"),
        ((), [3], "/val have label 3, but .* /train only labels up to 2"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], labels: list[int], message: str) -> None:
    """One sentence names both sides and what differs."""
    train = labelled("/train", [0, 1, 2], ("ant", "bee", "cow"))
    with pytest.raises(ConfigError, match=message) as error:
        check_same_classes(train, labelled("/val", labels, classes))
    assert "\n" not in str(error.value)
