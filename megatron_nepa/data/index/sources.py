"""Lists the images of every layout that can be indexed, before any of them is read.

A listing is a :class:`~megatron_nepa.data.index.dataset_index.DatasetIndex` whose widths and heights are still 0: what
:mod:`megatron_nepa.data.indexing.build` then verifies.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_nepa.config import require
from megatron_nepa.data.index.archives import list_tars
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import folder_listing, list_images, walked_folder
from megatron_nepa.data.index.walk import ARCHIVES, example


def list_source(source: str | Path, split: str = "training") -> DatasetIndex:
    """List the images of ``source``, whose layout is told from what is there.

    * a ``.tar`` file, or a folder of them without images: tar shards, in the WebDataset layout (``key.jpg`` with
      ``key.cls``, or ``key.json`` with a ``label``) or with class folders; a tar inside a tar is a class, as in
      ImageNet's training archive
    * a folder with ``images`` and ``annotations``: image and mask pairs of equal names, of one ``split`` where these
      have subfolders (ADE20K), else all
    * any other folder: an ImageFolder tree or a flat folder; archives beside the images are passed over

    Args:
        source: file or folder.
        split: subfolder of images and annotations to take, where they have any.

    Raises:
        ConfigError: nothing there, no images, or something that cannot be read or is there in two ways.
    """
    path = Path(source)
    if path.is_file() and path.name.lower().endswith(ARCHIVES):
        return list_tars(path.parent, [path.name])
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return _list_pairs(path, split)
    walked = walked_folder(path)
    archives = walked.archives()
    if archives and not walked.images:
        return list_tars(path, archives)
    require(
        not archives or len(archives) < len(walked.images),
        f"{path} holds {len(archives)} archives ({example(archives)}) beside {len(walked.images)} images: move one "
        "kind away.",
    )
    return folder_listing(path, walked)


def _listing(root: Path, names: list[str], labels: list[int], classes: tuple[str, ...]) -> DatasetIndex:
    unknown = np.zeros(len(names), np.int32)
    return DatasetIndex(root, PackedNames.pack(names), unknown, unknown, np.array(labels, np.int32), classes)


def _list_pairs(root: Path, split: str) -> DatasetIndex:
    has_splits = any(entry.is_dir() for entry in os.scandir(root / "images"))
    images, annotations = (Path(kind, split) if has_splits else Path(kind) for kind in ("images", "annotations"))
    require((root / images).is_dir(), f"{root} holds no {images}: choose a split that it has.")
    names, _, _ = list_images(root / images)
    found = os.listdir(root / annotations) if (root / annotations).is_dir() else []
    masks = {os.path.splitext(name)[0]: name for name in found}
    without = [name for name in names if os.path.splitext(name)[0] not in masks]
    paired = [name for name in names if os.path.splitext(name)[0] in masks]
    require(
        bool(paired),
        f"none of the {len(names)} images in {root / images} has a mask of its name in {root / annotations}.",
    )
    listing = _listing(root, [str(images / name) for name in paired], [-1] * len(paired), ())
    return replace(
        listing,
        masks=PackedNames.pack(str(annotations / masks[os.path.splitext(name)[0]]) for name in paired),
        quarantine=tuple((str(images / name), "has no mask") for name in without),
    )
