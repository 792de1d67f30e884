"""Lists the image and mask pairs of the layouts in which segmentation data sets come.

Every image gets the one mask of its name, whatever the order of a directory: where two files could be it, the folder is
refused.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import EXTENSIONS
from megatron_nepa.data.index.walk import PassedOver, images_in, is_image, walk
from megatron_nepa.terminal import counted

_SAME_SPLIT = {"training": "train", "train": "training", "validation": "val", "val": "validation"}
# why a mask is in the quarantine of an index
WITHOUT_IMAGE = "a mask without an image"


@dataclass(frozen=True)
class PairLayout:
    """How a data set's images and masks lie below its folder."""

    title: str
    # folders below the root
    images: str
    masks: str
    # what follows the name that both share
    image_ending: str = ""
    mask_ending: str = ""
    # folder of text files with the names of a split; empty where splits are subfolders
    lists: str = ""
    # names of the classes 0, 1, ...; empty where each data set has its own
    classes: tuple[str, ...] = ()


FOLDERS = PairLayout("images/ and annotations/", "images", "annotations")
CITYSCAPES = PairLayout(
    *("Cityscapes", "leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_labelTrainIds"),
    classes=(
        *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
        *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    ),
)
PASCAL_VOC = PairLayout(
    *("Pascal VOC", "JPEGImages", "SegmentationClass"),
    lists="ImageSets/Segmentation",
    classes=(
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ),
)
_CITYSCAPES_IDS = "_gtFine_labelIds"


def pair_layout(root: Path) -> PairLayout | None:
    """The layout of a folder of image and mask pairs; None where it is none."""
    for layout in (FOLDERS, CITYSCAPES, PASCAL_VOC):
        if (root / layout.images).is_dir() and (root / layout.masks).is_dir():
            return layout
    return None


def list_pairs(root: Path, layout: PairLayout, split: str) -> DatasetIndex:
    """The pairs of one split, sorted by name, their sizes not known yet (0).

    Args:
        root: the data set's folder.
        layout: from :func:`pair_layout`.
        split: which part; "train" stands for "training" and "val" for "validation" too, and the reverse.

    Returns:
        The listing; images without a mask and masks without an image are in ``quarantine``, except where a text file
        says which belong to the split.

    Raises:
        ConfigError: no such split, no pairs, two files that could be one image's mask, two images that would share a
            mask, or a listed name that is missing.
    """
    if layout.lists:
        names, part = _listed_names(root / layout.lists, split), ""
    else:
        names, part = None, _split_folder(root, layout, split)
    passed_over = PassedOver()
    images = _files(root, os.path.join(layout.images, part), layout.image_ending, passed_over)
    masks = _files(root, os.path.join(layout.masks, part), layout.mask_ending, passed_over)
    without = images.keys() - masks.keys()
    if layout is CITYSCAPES and without:
        _require_train_ids(root, part, without)
    where = f"{root / layout.images / part} has a mask of its name in {root / layout.masks / part}"
    if names is None:
        require(bool(images), f"{root / layout.images / part} holds no images ({', '.join(sorted(EXTENSIONS))}).")
        names = sorted(images.keys() & masks.keys())
        if not names:
            image, mask = (next((found[min(found)][0] for _ in found), "") for found in (images, masks))
            example = f": {image} is an image, {mask} a mask" if mask else f", which holds no *{layout.mask_ending}.png"
            raise ConfigError(f"none of the {counted(len(images), 'image')} in {where}{example}.")
        quarantine = [(file, "has no mask") for key in sorted(images.keys() - masks.keys()) for file in images[key]]
        quarantine += [(file, WITHOUT_IMAGE) for key in sorted(masks.keys() - images.keys()) for file in masks[key]]
    else:
        quarantine = []
        for kind, files in ((layout.images, images), (layout.masks, masks)):
            missing = [name for name in names if name not in files]
            require(
                not missing,
                f"{len(missing)} of the {len(names)} names that {root / layout.lists} lists for the split {split} are "
                f"missing in {root / kind}; the first: {missing[:1]}: add the files, or take the names out.",
            )
    for files, wrong in ((images, "images for one mask"), (masks, "masks for one image")):
        twice = [files[name] for name in names if len(files[name]) > 1]
        require(
            not twice,
            f"{root} holds several {wrong}, {counted(len(twice), 'time')}; the first: "
            f"{' and '.join((twice or [[]])[0])}: keep one of them.",
        )
    unknown = np.zeros(len(names), np.int32)
    return DatasetIndex(
        root,
        PackedNames.pack(images[name][0] for name in names),
        unknown,
        unknown,
        np.full(len(names), -1, np.int32),
        masks=PackedNames.pack(masks[name][0] for name in names),
        quarantine=tuple(quarantine),
        notes=passed_over.note(),
    )


def _split_folder(root: Path, layout: PairLayout, split: str) -> str:
    """The split's subfolder of images and masks; nothing where images lie right inside."""
    try:
        entries = [entry for entry in os.scandir(root / layout.images) if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"the data folder {root / layout.images} cannot be read: {error.strerror}.") from error
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if entry.is_file() and is_image(entry.name))
    part = next((name for name in (split, _SAME_SPLIT.get(split)) if name in folders), None)
    if loose:
        require(
            part is None,
            f"{root / layout.images} holds {counted(len(loose), 'image')} ({loose[0]}, ...) beside the folder "
            f"{part} of a split: move one kind away.",
        )
        return ""
    require(
        part is not None or not folders,
        f"{root} holds no {layout.images}/{split}: choose a split that it has ({', '.join(folders)}).",
    )
    require(
        (root / layout.masks / (part or "")).is_dir(),
        f"{root} holds {layout.images}/{part}, but no {layout.masks}/{part} with its masks.",
    )
    return part or ""


def _listed_names(folder: Path, split: str) -> list[str]:
    file = next((path for name in (split, _SAME_SPLIT.get(split)) if (path := folder / f"{name}.txt").is_file()), None)
    if file is None:
        known = sorted(path.stem for path in folder.glob("*.txt"))
        has = f"choose a split that it has ({', '.join(known)})" if known else "write its names there, one a line"
        raise ConfigError(f"{folder} holds no {split}.txt: {has}.")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list of names {file} cannot be read: {error}.") from error
    require(bool(names), f"{file} lists no names: write one a line.")
    name, times = Counter(names).most_common(1)[0]
    require(times == 1, f"{file} lists {name} {times} times: keep one.")
    return names


def _files(root: Path, folder: str, ending: str, passed_over: PassedOver) -> dict[str, list[str]]:
    """Image files below ``folder`` whose stem ends so, sorted paths below root, by what their pairs share."""
    walked = walk(root / folder)
    passed_over.merge(walked.besides(tars=False, below=folder))
    found: dict[str, list[str]] = {}
    for inside in walked.folders:
        for path in images_in(root / folder, inside):
            stem = os.path.splitext(path)[0]
            if stem.endswith(ending):
                # as NFC: one of the two may have been named on macOS, which writes é in two letters
                shared = unicodedata.normalize("NFC", os.path.normpath(stem.removesuffix(ending)))
                found.setdefault(shared, []).append(os.path.join(folder, path))
    return {key: sorted(found[key]) for key in sorted(found)}


def _require_train_ids(root: Path, part: str, without: set[str]) -> None:
    """Refuse images whose only label file numbers all 34 kinds of things, rather than the 19 classes."""
    ids = without & _files(root, os.path.join(CITYSCAPES.masks, part), _CITYSCAPES_IDS, PassedOver()).keys()
    require(
        not ids,
        f"{counted(len(ids), 'image')} of {root / CITYSCAPES.images / part} with labelIds only, the first "
        f"{min(ids, default='')}: make labelTrainIds, the 19 classes, by `pip install cityscapesscripts` and "
        f"`CITYSCAPES_DATASET={root} csCreateTrainIdLabelImgs`.",
    )
