"""An ImageFolder tree or a flat folder of images: what is in it.

Files are sorted by name, so every rank that looks gets the same index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.headers import EXTENSIONS, InaccessibleImageError, UnreadableImageError
from megatron_nepa.data.index.label_values import alike
from megatron_nepa.data.index.listing import Facts, Listed, Numbering, Source
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.index.walk import Walked, images_in, walk
from megatron_nepa.terminal import counted

# the usual names of the parts of a data set
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# usual names of a folder of images, and of one of their masks
_IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
_MASKS = {"masks", "mask", "annotations", "annotation", "labels"}


def scan_folder(folder: str | Path) -> DatasetIndex:
    """Index an ImageFolder tree (one subfolder a class) or a flat folder of images, by reading every header.

    Args:
        folder: the tree or folder. Files are known as images by their extension; others are ignored.

    Returns:
        The index; labels follow the sorted class names, or are -1 in a flat folder. Images whose header is damaged or
        of an unsupported kind are in ``quarantine``.

    Raises:
        ConfigError: no such folder, one of which a part cannot be read, no images in it, none readable, or images both
            beside and inside class folders.
    """
    return read_sizes(list_folder(Path(folder)))


def read_sizes(listing: DatasetIndex) -> DatasetIndex:
    """A listing with the sizes from its images' headers, without those that have no readable one (``quarantine``).

    Raises:
        ConfigError: none is readable, or the system does not give one's bytes.
    """
    store = ImageStore(listing)
    sizes, kept, quarantine = [], [], []
    for i in range(len(listing)):
        try:
            sizes.append(store.image_size(i))
            kept.append(i)
        except InaccessibleImageError as error:
            raise ConfigError(f"{listing.where(i)} cannot be read: {error}.") from error
        except UnreadableImageError as error:
            quarantine.append((listing.names[i], str(error)))
    if not kept:
        name, reason = quarantine[0]
        raise ConfigError(
            f"none of the {counted(len(listing), 'image file')} in {listing.root} can be read; the first, "
            f"{name}: {reason}."
        )
    width, height = np.array(sizes, np.int32).T.copy()
    index = listing if len(kept) == len(listing) else listing.select(np.array(kept))
    return replace(index, width=width, height=height, quarantine=(*listing.quarantine, *quarantine))


def list_folder(root: Path) -> DatasetIndex:
    """The images of a tree or folder by their extension, their sizes not known yet (0)."""
    return FolderSource(root, walked_folder(root)).listing()


class FolderSource(Source):
    """The images that were found below a folder, listed class by class.

    Args:
        root: the folder.
        walked: what was found.

    Raises:
        ConfigError: no images, or both beside and inside class folders.
    """

    unit = "folders"

    def __init__(self, root: Path, walked: Walked) -> None:
        self.root, self._folder, self._walked = root, root, walked
        self.units: tuple[str, ...] = _classes(root, walked) or ("",)
        self._folders: dict[str, list[str]] = {name: [] for name in self.units}
        for folder in walked.folders:
            self._folders[folder.split("/", 1)[0]].append(folder)

    def list(self, number: int) -> Listed:
        """The images of one class, by path; of a flat folder all."""
        name = self.units[number]
        found = (image for folder in self._folders[name] for image in images_in(self._folder, folder))
        names = PackedNames.pack(sorted(found))
        unknown = np.zeros(len(names), np.int32)
        label = np.full(len(names), number if name else -1, np.int32)
        return Listed(DatasetIndex(self.root, names, unknown, unknown, label), Facts(len(names)))

    def is_current(self, number: int, images: DatasetIndex) -> bool:
        """Whether the folders hold the same names."""
        now = self.list(number).images.names
        return np.array_equal(now.text, images.names.text) and np.array_equal(now.ends, images.names.ends)

    def number(self, facts: Iterable[Facts]) -> Numbering:
        """Classes are the folders, by name."""
        classes = self.units if self.units != ("",) else ()
        notes = (*self._walked.besides(tars=False).note(), *alike(classes))
        if len(classes) > 1 and _SPLITS.issuperset(name.lower() for name in classes):
            notes += (f"its classes are {', '.join(classes)}: if these are the parts of a data set, give one of them",)
        lowered = {name.lower() for name in classes}
        if len(classes) == 2 and lowered & _IMAGES and lowered & _MASKS:
            notes += (
                f"its classes are {', '.join(classes)}: if these are images and their masks, call the folders images "
                "and annotations",
            )
        return Numbering(classes, notes)


def walked_folder(root: Path) -> Walked:
    """What lies below ``root``.

    Raises:
        ConfigError: no such folder, or one of which a part cannot be read.
    """
    if not root.is_dir():
        wrong = "is a file: give its folder, or an index" if root.exists() else "does not exist"
        raise ConfigError(f"the data folder {root} {wrong}.")
    return walk(root)


def _classes(root: Path, walked: Walked) -> tuple[str, ...]:
    """The class folders; none where images lie right inside."""
    loose = walked.folders.get("", 0)
    classes = tuple(sorted({folder.split("/", 1)[0] for folder in walked.folders if folder}))
    if loose and classes:
        raise ConfigError(
            f"{root} holds {counted(loose, 'image')} beside class folders ({classes[0]}, ...): an "
            "ImageFolder tree keeps every image in a class folder and a flat folder has no subfolders with images; "
            "move one kind away."
        )
    if not walked.images and any(name.lower().endswith(".tar") for name in walked.archives):
        raise ConfigError(
            f"{root} holds tar shards: index them with tools/index_dataset.py and give the index as --data."
        )
    if not walked.images and walked.tables:
        raise ConfigError(
            f"{root} holds Arrow or parquet files: index them with tools/index_dataset.py and give the index as --data."
        )
    if not walked.images:
        passed_over = "".join(f"; {note}" for note in walked.besides(tars=False).note())
        raise ConfigError(f"the data folder {root} holds no images ({', '.join(sorted(EXTENSIONS))}){passed_over}.")
    return classes
