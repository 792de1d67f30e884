"""Which files of a data set belong to which of its splits, by their names."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict

from megatron_nepa.config import require

_KNOWN = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?$")


def split_of(name: str) -> str:
    """The split that a file's name tells: train of ``data/train-00000-of-00294.parquet``; "" where it tells none.

    Args:
        name: path of the file below its data set.
    """
    folder, base = posixpath.split(name)
    stem = posixpath.splitext(base)[0]
    number = _NUMBER.search(stem)
    word = re.split(r"[-_.]", _NUMBER.sub("", stem))[-1].lower()
    of = number is not None and number[1] is not None
    return _KNOWN.get(word) or (word if of else _KNOWN.get(posixpath.basename(folder).lower(), ""))


def choose_split(names: list[str], asked: str, where: str) -> tuple[list[str], tuple[str, ...]]:
    """The files of one split, where every name tells one and they differ; else all of them.

    Args:
        names: paths of the files.
        asked: the wanted split; "training" and "train" mean the same, as do "val" and "validation".
        where: what holds them, for the message.

    Returns:
        The files in their order, and a note of what was chosen.

    Raises:
        ConfigError: none of the splits is the wanted one.
    """
    of_split: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        of_split[split_of(name)].append(name)
    if len(of_split) <= 1 or "" in of_split:
        return names, ()
    wanted, found = _KNOWN.get(asked.lower(), asked), ", ".join(sorted(of_split))
    require(
        wanted in of_split, f"{where} holds the splits {found}, and none of them is {asked}: choose one with --split."
    )
    return of_split[wanted], (f"split {wanted} of {found}",)
