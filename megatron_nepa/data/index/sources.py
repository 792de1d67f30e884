"""Lists the images of every layout that can be indexed, before any of them is read.

A listing is a :class:`~megatron_nepa.data.index.dataset_index.DatasetIndex` whose widths and heights are still 0: what
:mod:`megatron_nepa.data.indexing.build` then verifies.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_nepa.config import require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import list_folder, list_images
from megatron_nepa.data.index.headers import EXTENSIONS

CLASSES_FILE = "classes.json"  # beside tar shards: the class names, by number


def list_source(source: str | Path, split: str = "training") -> DatasetIndex:
    """List the images of ``source``, whose layout is told from what is there.

    * a ``.tar`` file, or a folder of them: tar shards, in the WebDataset layout (``key.jpg`` with ``key.cls``, or
      ``key.json`` with a ``label``) or with class folders; a tar inside a tar is a class, as in ImageNet's training
      archive
    * a folder with ``images`` and ``annotations``: image and mask pairs of equal names, of one ``split`` where these
      have subfolders (ADE20K), else all
    * any other folder: an ImageFolder tree or a flat folder

    Args:
        source: file or folder.
        split: subfolder of images and annotations to take, where they have any.

    Raises:
        ConfigError: nothing there, or no images.
    """
    path = Path(source)
    if path.suffix == ".tar" and path.is_file():
        return _list_tars(path.parent, [path.name])
    if path.is_dir() and (tars := sorted(entry.name for entry in path.glob("*.tar"))):
        return _list_tars(path, tars)
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return _list_pairs(path, split)
    return list_folder(path)


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


@dataclass
class _Member:
    """One image inside a tar file."""

    name: str
    offset: int
    size: int
    group: str  # class name: the inner tar, or the folder; "" where there is none
    number: int = -1  # class number from the .cls or .json file of the same key


def _list_tars(root: Path, tars: list[str]) -> DatasetIndex:
    members: list[_Member] = []
    shard: list[int] = []
    quarantine: list[tuple[str, str]] = []
    for number, name in enumerate(tars):
        with open(root / name, "rb") as file:
            before = len(members)
            members += _walk_tar(file, name, 0, os.path.getsize(root / name), "", quarantine)
            shard += [number] * (len(members) - before)
    require(
        bool(members), f"the tar files of {root} ({tars[0]}, ...) hold no images ({', '.join(sorted(EXTENSIONS))})."
    )
    numbered = any(member.number >= 0 for member in members)
    named = (root / CLASSES_FILE).is_file()
    if numbered:
        classes = _read_classes(root / CLASSES_FILE) if named else ()
    else:
        classes = tuple(sorted({member.group for member in members} - {""}))
    most = max(member.number for member in members)
    require(
        not classes or most < len(classes),
        f"the tar files of {root} hold the label {most}, but {CLASSES_FILE} names {len(classes)} classes, from 0.",
    )
    of_group = {group: i for i, group in enumerate(classes)}
    labels = [member.number if numbered else of_group.get(member.group, -1) for member in members]
    listing = _listing(root, [member.name for member in members], labels, classes)
    return replace(
        listing,
        shards=tuple(tars),
        shard=np.array(shard, np.int32),
        offset=np.array([member.offset for member in members], np.int64),
        size=np.array([member.size for member in members], np.int64),
        quarantine=tuple(quarantine),
    )


def _read_classes(file: Path) -> tuple[str, ...]:
    try:
        classes = json.loads(file.read_text())
    except ValueError:
        classes = None
    require(
        isinstance(classes, list) and all(isinstance(name, str) for name in classes),
        f"{file} is no JSON list of class names: repair it, or remove it to have classes without names.",
    )
    return tuple(classes)


def _walk_tar(
    file: BinaryIO, name: str, start: int, end: int, group: str, quarantine: list[tuple[str, str]]
) -> list[_Member]:
    """The images of the archive in bytes [start, end) of ``file``, with those of the archives inside it."""
    images: list[_Member] = []
    numbers: dict[str, int] = {}
    whole = True
    try:
        file.seek(start)
        archive = tarfile.TarFile(fileobj=file)
        while whole and (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # a million TarInfo objects would stay in memory
            offset, stem, extension = member.offset_data, *os.path.splitext(member.name)
            whole = offset + member.size <= end
            if not whole or not member.isfile():
                continue
            if extension == ".tar":
                stop = offset + member.size
                images += _walk_tar(file, f"{name}/{member.name}", offset, stop, os.path.basename(stem), quarantine)
            elif extension in (".cls", ".json"):
                file.seek(offset)
                numbers[stem] = max(_class_number(file.read(member.size)), numbers.get(stem, -1))
            elif extension.lower() in EXTENSIONS and not os.path.basename(stem).startswith("."):
                folder = group or os.path.basename(os.path.dirname(member.name))
                images.append(_Member(member.name, offset, member.size, folder))
        # tarfile ends in silence at damage behind the first header: only a block of zeros marks the true end
        file.seek(archive.offset)
        block = file.read(max(0, min(512, end - archive.offset)))
        whole = whole and len(block) == 512 and not any(block)
    except (tarfile.TarError, ValueError):
        whole = False
    if not whole:
        quarantine.append((name, f"the tar file is cut short or damaged: only its first {len(images)} images are kept"))
    for image in images:
        image.number = numbers.get(os.path.splitext(image.name)[0], image.number)
    return images


def _class_number(content: bytes) -> int:
    """The number in a .cls file, or under "label" in a .json file; -1 where there is none."""
    try:
        value = json.loads(content)
        return int(value["label"] if isinstance(value, dict) else value)
    except (ValueError, KeyError, TypeError):
        return -1
