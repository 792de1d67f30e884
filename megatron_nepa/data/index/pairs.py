"""The image and mask pairs of a segmentation run, and the names of their classes."""

from __future__ import annotations

from pathlib import Path

from megatron_nepa.config import ConfigError, MaskConfig, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import read_sizes
from megatron_nepa.data.index.index_file import is_index, load_index
from megatron_nepa.data.index.pair_layouts import WITHOUT_IMAGE, pair_layout
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.terminal import counted

ADE20K_NAMES = "objectInfo150.txt"
CLASS_NAMES = "classes.txt"


def pair_index(path: str, split: str, verbose: bool = True) -> DatasetIndex:
    """The pairs that ``path`` names.

    Args:
        path: a folder with ``images`` and ``annotations``, or an index of one that tools/index_dataset.py wrote.
        split: part to take, where the folder has any.
        verbose: say in one line what was left out.

    Raises:
        ConfigError: nothing there, no pairs, or none that can be read.
    """
    index = load_index(path) if is_index(path) else read_sizes(list_source(path, split))
    require_masks(index)
    if verbose:
        if index.notes:
            print(f"{index.root}: {counted(len(index), 'pair')}; {'; '.join(index.notes)}")
        alone = [name for name, reason in index.quarantine if reason == WITHOUT_IMAGE]
        if alone:
            masks = counted(len(alone), "mask")
            print(f"left out {masks} without an image in {index.root}; the first: {alone[0]}")
        images = [(name, reason) for name, reason in index.quarantine if reason != WITHOUT_IMAGE]
        if images:
            name, reason = images[0]
            print(f"left out {counted(len(images), 'image')} of {index.root}; the first, {name}: {reason}")
    return index


def require_masks(index: DatasetIndex) -> None:
    """Refuse an index of images without masks."""
    require(
        len(index.masks) == len(index) > 0,
        f"{index.root} has no masks: segmentation takes a folder with images/ and annotations/, with Cityscapes' "
        "leftImg8bit/ and gtFine/, with Pascal VOC's JPEGImages/ and SegmentationClass/, or an index of one.",
    )


def class_names(root: Path, masks: MaskConfig) -> tuple[str, ...]:
    """Names of the classes for tables and pictures.

    From ``classes.txt`` below ``root``, one name a line in the order of the classes, or ADE20K's own
    ``objectInfo150.txt``; where there is neither, Cityscapes' or Pascal VOC's where the folder has that layout, else
    "class 0" and so on.

    Raises:
        ConfigError: the file cannot be read or names another number of classes, or the layout's masks mean others.
    """
    num_classes = masks.num_classes
    file = next((root / name for name in (CLASS_NAMES, ADE20K_NAMES) if (root / name).is_file()), None)
    if file is None:
        layout = pair_layout(root)
        if layout is None or not layout.classes:
            return tuple(f"class {i}" for i in range(num_classes))
        require(
            num_classes == len(layout.classes) and not masks.reduce_zero_label,
            f"{root} has {layout.title}'s layout, but --masks.num_classes is {num_classes} and "
            f"--masks.reduce_zero_label {str(masks.reduce_zero_label).lower()}: set {len(layout.classes)} and false, "
            f"or name other classes in {root / CLASS_NAMES}, one a line.",
        )
        return layout.classes
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the class names in {file} cannot be read: {error}.") from error
    if file.name == ADE20K_NAMES:
        # a header, then tab-separated columns, the last of which is "wall", or "door;double door"
        lines = [line.split("\t")[-1].split(";")[0].split(",")[0].strip() for line in lines[1:]]
    require(
        len(lines) == num_classes,
        f"{file} names {counted(len(lines), 'class', 'classes')}, but --masks.num_classes is {num_classes}.",
    )
    return tuple(lines)
