"""The bytes of one image of an index, from its own file or from a shard: a tar, Arrow or parquet file."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import InaccessibleImageError, UnreadableImageError, check_signature, image_size

_MAX_OPEN_SHARDS = 128
_HEADER_BYTES = 65536


class ImageStore:
    """Reads encoded images; safe to call from several threads."""

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()

    def read(self, i: int, at_most: int | None = None) -> npt.NDArray[np.uint8]:
        """The encoded bytes of image ``i``, uint8 [n], or the first ``at_most`` of them.

        Raises:
            InaccessibleImageError: the file or shard is gone, or the system does not give its bytes.
            UnreadableImageError: the shard is cut short, or the bytes begin like no image. Both have the reason alone,
                since the caller knows which image it asked for (:meth:`DatasetIndex.where` names it).
        """
        index = self._index
        try:
            if index.shards:
                size = int(index.size[i]) if at_most is None else min(at_most, int(index.size[i]))
                data = self._shard(int(index.shard[i])).read(int(index.offset[i]), size)
            else:
                with open(index.root / index.names[i], "rb", buffering=0) as file:
                    data = file.readall() if at_most is None else file.read(at_most)
        except OSError as error:
            raise InaccessibleImageError((error.strerror or str(error)).lower()) from error
        check_signature(data)
        return np.frombuffer(data, np.uint8)

    def image_size(self, i: int) -> tuple[int, int]:
        """Stored width and height of image ``i`` from its header.

        Raises:
            UnreadableImageError: it cannot be read, or its header is damaged or of an unsupported kind.
        """
        try:
            return image_size(self.read(i, at_most=_HEADER_BYTES).tobytes())
        except InaccessibleImageError:
            raise
        except UnreadableImageError:
            # a thumbnail or colour profile can push the size further back
            return image_size(self.read(i).tobytes())

    def close(self) -> None:
        """Close the open shards."""
        with self._lock:
            self._open_shards.clear()

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            shard = self._open_shards.pop(number, None) or _Shard(self._index.root / self._index.shards[number])
            self._open_shards[number] = shard
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                # closed by its last reader: another thread may be inside read() with it
                self._open_shards.popitem(last=False)
            return shard


def read_mask(index: DatasetIndex, i: int) -> bytes:
    """The encoded mask of image ``i``.

    Raises:
        InaccessibleImageError: it cannot be had, with the reason alone.
        UnreadableImageError: the shard is cut short.
    """
    try:
        if not len(index.mask_offset):
            return (index.root / index.masks[i]).read_bytes()
        shard = _Shard(index.root / index.shards[int(index.shard[i])])
        return shard.read(int(index.mask_offset[i]), int(index.mask_size[i]))
    except OSError as error:
        raise InaccessibleImageError((error.strerror or str(error)).lower()) from error


class _Shard:
    """One open shard, closed when nothing refers to it."""

    def __init__(self, path: os.PathLike[str]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        # pread rather than a memory map: a shard cut short under a map would end the process with a bus error
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise UnreadableImageError(f"the shard ends {size - len(data)} bytes before this image does")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
