"""An ImageFolder tree or a flat folder of images: what is in it.

Files are sorted by name, so every rank that looks gets the same index.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import EXTENSIONS, UnreadableImageError
from megatron_nepa.data.index.storage import ImageStore


def scan_folder(folder: str | Path) -> DatasetIndex:
    """Index an ImageFolder tree (one subfolder a class) or a flat folder of images, by reading every header.

    Args:
        folder: the tree or folder. Files are known as images by their extension; others are ignored.

    Returns:
        The index; labels follow the sorted class names, or are -1 in a flat folder. Images whose header is damaged or
        of an unsupported kind are in ``quarantine``.

    Raises:
        ConfigError: no such folder, no images in it, none readable, or images both beside and inside class folders.
    """
    return read_sizes(list_folder(Path(folder)))


def read_sizes(listing: DatasetIndex) -> DatasetIndex:
    """A listing with the sizes from its images' headers, without those that have no readable one (``quarantine``).

    Raises:
        ConfigError: none is readable.
    """
    store = ImageStore(listing)
    sizes, kept, quarantine = [], [], []
    for i in range(len(listing)):
        try:
            sizes.append(store.image_size(i))
            kept.append(i)
        except UnreadableImageError as error:
            quarantine.append((listing.names[i], str(error)))
    if not kept:
        name, reason = quarantine[0]
        raise ConfigError(
            f"none of the {len(listing)} image files in {listing.root} can be read; the first, {name}: {reason}."
        )
    width, height = np.array(sizes, np.int32).T.copy()
    index = listing if len(kept) == len(listing) else listing.select(np.array(kept))
    return replace(index, width=width, height=height, quarantine=(*listing.quarantine, *quarantine))


def list_folder(root: Path) -> DatasetIndex:
    """The images of a tree or folder by their extension, their sizes not known yet (0)."""
    names, labels, classes = list_images(root)
    unknown = np.zeros(len(names), np.int32)
    return DatasetIndex(root, PackedNames.pack(names), unknown, unknown, np.array(labels, np.int32), classes)


def list_images(root: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Image files below ``root`` by extension, sorted: (paths relative to root, class numbers or -1, class names)."""
    if not root.is_dir():
        wrong = "is a file: give its folder, or an index" if root.exists() else "does not exist"
        raise ConfigError(f"the data folder {root} {wrong}.")
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"the data folder {root} cannot be read: {error.strerror}.") from error
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    folders = [entry.name for entry in entries if _is_followed(entry.path)]
    images = {folder: _walk(root, folder) for folder in folders}
    classes = tuple(folder for folder in folders if images[folder])
    if loose and classes:
        raise ConfigError(
            f"{root} holds {len(loose)} images beside class folders ({classes[0]}, ...): an ImageFolder tree keeps "
            "every image in a class folder and a flat folder has no subfolders with images; move one kind away."
        )
    if not loose and not classes:
        raise ConfigError(f"the data folder {root} holds no images ({', '.join(sorted(EXTENSIONS))}).")
    if loose:
        return loose, [-1] * len(loose), ()
    names = [name for folder in classes for name in images[folder]]
    labels = [number for number, folder in enumerate(classes) for _ in images[folder]]
    return names, labels, classes


def _walk(root: Path, folder: str) -> Sequence[str]:
    found = []
    for where, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(os.path.join(where, name))]
        relative = os.path.relpath(where, root)
        found += [os.path.join(relative, file) for file in files if _is_image(file)]
    return sorted(found)


def _is_followed(path: str) -> bool:
    return os.path.isdir(path) and not os.path.basename(path).startswith(".") and not _leads_back(path)


def _leads_back(path: str) -> bool:
    """Whether a symbolic link points to a folder that it lies in, whose images would be listed again and again."""
    if not os.path.islink(path):
        return False
    target, inside = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return os.path.commonpath((target, inside)) == target


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
