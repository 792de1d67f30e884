"""The bytes of one image of an index, from its own file or from a tar shard."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.headers import UnreadableImageError, check_signature
from megatron_nepa.data.index import DatasetIndex

_MAX_OPEN_SHARDS = 128


class ImageStore:
    """Reads encoded images; safe to call from several threads."""

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """The encoded bytes of image ``i``, uint8 [n].

        Raises:
            UnreadableImageError: the file or shard is gone, cut short, or begins like no image; the message names it.
        """
        index = self._index
        try:
            if index.shards:
                data = self._shard(int(index.shard[i])).read(int(index.offset[i]), int(index.size[i]))
            else:
                with open(index.root / index.names[i], "rb", buffering=0) as file:
                    data = file.readall()
            check_signature(data)
        except OSError as error:
            raise UnreadableImageError(f"{index.where(i)}: {(error.strerror or str(error)).lower()}") from error
        except UnreadableImageError as reason:
            raise UnreadableImageError(f"{index.where(i)}: {reason}") from None
        return np.frombuffer(data, np.uint8)

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
