"""Fashion-MNIST as JPEG files and indexes: 60,000 training and 10,000 test photographs, and fractions of the labels.

    FOLDER/train/T-shirt/00017.jpg ...   FOLDER/test/...
    FOLDER/train.index   FOLDER/train_10.index   FOLDER/train_1.index   FOLDER/held_out.index   FOLDER/test.index

``held_out.index`` names the last 500 training photographs of every class, which no smaller fraction holds: choices are
made on them, not on the test photographs.
The data set (Xiao et al. 2017, MIT licence) is Debian's package ``dataset-fashion-mnist``
(``apt-get install dataset-fashion-mnist``); elsewhere give the folder with its four idx files.
"""

from __future__ import annotations

import gzip
import secrets
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.index_file import is_index, save_index

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
PERCENTS = (1, 10, 100)  # of the training labels
HELD_OUT = 500  # of each class, at the end of the training photographs
SIDE = 28
_JPEG_QUALITY = 95


def prepare(source: Path, folder: Path) -> None:
    """Write the JPEG files and the indexes, once; a second call does nothing.

    Args:
        source: folder of the four ``*-ubyte.gz`` files.
        folder: that is written, in one piece.

    Raises:
        ConfigError: where a file of the data set is missing or is not it.
    """
    if is_index(folder / "test.index"):
        return
    require(not folder.exists(), f"{folder} exists but holds no prepared data: remove it, or choose another --data.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")  # mkdtemp would lock out others
    beside.mkdir()
    try:
        for split, (prefix, count) in SPLITS.items():
            images = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz", (count, SIDE, SIDE))
            labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", (count,))
            names = _write_images(images, labels, beside / split)
            index = _index(beside / split, names, labels)
            if split == "test":
                save_index(index, beside / "test.index")
                continue
            for percent in PERCENTS:
                name = "train.index" if percent == 100 else f"train_{percent}.index"
                save_index(index.select(first_of_each_class(labels, percent)), beside / name)
            save_index(index.select(last_of_each_class(labels, HELD_OUT)), beside / "held_out.index")
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def first_of_each_class(labels: npt.NDArray[np.uint8], percent: int) -> npt.NDArray[np.int64]:
    """The first ``percent`` per cent of every class, in the order of the data set, int64."""
    rows = [np.flatnonzero(labels == label) for label in range(len(CLASSES))]
    return np.sort(np.concatenate([row[: len(row) * percent // 100] for row in rows]))


def last_of_each_class(labels: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    """The last ``count`` of every class, in the order of the data set, int64."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[-count:] for label in range(len(CLASSES))]))


def _read_idx(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    require(
        path.is_file(),
        f"{path} does not exist: install Debian's package dataset-fashion-mnist, or give the folder that holds "
        "Fashion-MNIST's idx files as --source.",
    )
    header = 4 + 4 * len(shape)
    try:
        content = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
        found = tuple(np.frombuffer(content[4:header].tobytes(), ">u4").tolist())
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is no gzipped idx file ({error}).") from None
    require(found == shape, f"{path} holds {found} values, not the {shape} of Fashion-MNIST.")
    return content[header:].reshape(shape)


def _write_images(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], folder: Path) -> list[str]:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    names = []
    for number, (image, label) in enumerate(
        zip(tqdm(images, desc=f"writing {folder.name}", unit=" images", leave=False), labels, strict=True)
    ):
        name = f"{CLASSES[label]}/{number:05}.jpg"
        Image.fromarray(image).save(folder / name, quality=_JPEG_QUALITY)
        names.append(name)
    return names


def _index(root: Path, names: list[str], labels: npt.NDArray[np.uint8]) -> DatasetIndex:
    side = np.full(len(names), SIDE, np.int32)
    return DatasetIndex(root, PackedNames.pack(names), side, side, labels.astype(np.int32), CLASSES)
