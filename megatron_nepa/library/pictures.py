"""Images to look at, without labels: of a folder, an index, shards, or a list of files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import PackedNames
from megatron_nepa.data.index.headers import MODES, UnreadableImageError, open_image
from megatron_nepa.data.index.index_file import is_index, load_index
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.index.storage import ImageStore

T = TypeVar("T")
_AHEAD = 4  # batches that are decoded before they are asked for


@dataclass(frozen=True)
class Pictures:
    """Images by number.

    Attributes:
        names: what each is called: its path below the folder or as the list gives it, or its name in a shard.
        read: image number i as Pillow's RGB; safe to call from several threads.
        notes: what the listing passed over, in words.
    """

    names: PackedNames
    read: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()

    def batches(
        self, numbers: Sequence[int], size: int, transform: Callable[[Image.Image], T], threads: int
    ) -> Iterator[list[T]]:
        """The images of ``numbers`` in order, transformed in threads ahead of their use.

        Args:
            numbers: of the images.
            size: images of a batch.
            transform: of each.
            threads: that decode.

        Raises:
            ConfigError: for less than one thread, or an image that cannot be decoded, by name.
        """
        require(threads >= 1, f"threads is {threads}; it must be at least 1.")
        parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:
            pending = [[pool.submit(self._load, i, transform) for i in part] for part in parts[:_AHEAD]]
            try:
                for place in range(len(parts)):
                    batch = [future.result() for future in pending.pop(0)]
                    if place + _AHEAD < len(parts):
                        pending.append([pool.submit(self._load, i, transform) for i in parts[place + _AHEAD]])
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

    def _load(self, number: int, transform: Callable[[Image.Image], T]) -> T:
        return transform(self.read(number))


def find_pictures(source: Path) -> Pictures:
    """The images of ``source``, in the order of its listing.

    Args:
        source: a folder, an index, a tar, Arrow or parquet file or a folder of them; or a text file (``.txt``) with the
            path of an image on each line, from the text file's folder on where it is no absolute one.

    Raises:
        ConfigError: nothing there; while reading, an image that cannot be decoded, by name.
    """
    require(source.exists(), f"{source} does not exist: give a folder of images, an index, or a .txt list of files.")
    if source.suffix == ".txt" and source.is_file():
        return _listed(source)
    index = load_index(source) if is_index(source) else list_source(source)
    store = ImageStore(index)

    def read(number: int) -> Image.Image:
        try:
            return _decode(store.read(number).tobytes())
        except (UnreadableImageError, OSError) as error:
            raise ConfigError(f"{index.where(number)} cannot be read: {error}; repair it or leave it out.") from None

    return Pictures(index.names, read, index.notes)


def _listed(file: Path) -> Pictures:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is no text in UTF-8: give a list with the path of an image on each line.") from None
    require(bool(names), f"{file} names no images: give the path of an image on each line.")
    missing = [name for name in names if not (file.parent / name).is_file()]
    require(not missing, f"{file} names {len(missing)} of {len(names)} files that are not there, {missing[:1]} first.")

    def read(number: int) -> Image.Image:
        path = file.parent / names[number]
        try:
            return _decode(path.read_bytes())
        except (UnreadableImageError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; repair it or leave it out.") from None

    return Pictures(PackedNames.pack(names), read)


def _decode(data: bytes) -> Image.Image:
    try:
        with open_image(io.BytesIO(data)) as image:
            if image.mode in MODES:
                return image.convert("RGB")
            mode = image.mode
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:  # whose words name an object in memory
        raise UnreadableImageError("it is no image, or a damaged one") from None
    except Exception as error:  # PIL raises a dozen types on damaged files
        raise UnreadableImageError(str(error) or type(error).__name__) from error
    # Pillow would cut 16 bits to 8 by making all that is brighter white
    raise UnreadableImageError(f"pixels of mode {mode} are not supported")
