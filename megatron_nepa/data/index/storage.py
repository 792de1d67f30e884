"""The bytes of one image of an index, from its own file or from a shard: a tar, Arrow or parquet file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.dataset_index import DatasetIndex, Stamp, edges_of
from megatron_nepa.data.index.headers import InaccessibleImageError, UnreadableImageError, check_signature, image_size
from megatron_nepa.data.index.remote_shards import RemoteShard, RemoteShards
from megatron_nepa.data.remote.files import RemoteFiles
from megatron_nepa.data.remote.folder import RefusedError, RemoteFolder

_MAX_OPEN_SHARDS = 128
HEADER_BYTES = 65536


class ImageStore:
    """Reads encoded images; safe to call from several threads."""

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()
        self._remote = RemoteShards(index) if index.is_remote else None

    def read(self, i: int, at_most: int | None = None) -> npt.NDArray[np.uint8]:
        """The encoded bytes of image ``i``, uint8 [n], or the first ``at_most`` of them.

        Raises:
            ConfigError: the shard was replaced since it was indexed.
            SourceLostError: a remote shard cannot be read.
            InaccessibleImageError: the file or shard is gone, or the system does not give its bytes.
            UnreadableImageError: the shard is cut short, or the bytes begin like no image. Both have the reason alone,
                since the caller knows which image it asked for (:meth:`DatasetIndex.where` names it).
        """
        index = self._index
        try:
            if index.shards:
                size = int(index.size[i]) if at_most is None else min(at_most, int(index.size[i]))
                shard, offset = int(index.shard[i]), int(index.offset[i])
                read = self._read_local if self._remote is None else self._remote.read
                data = read(shard, offset, size)
            else:
                with open(index.folder / index.names[i], "rb", buffering=0, opener=_open_regular) as file:
                    data = file.readall() if at_most is None else file.read(at_most)
        except OSError as error:
            raise InaccessibleImageError((error.strerror or str(error)).lower()) from error
        try:
            check_signature(data)
        except UnreadableImageError:
            if self._remote is not None:  # other bytes than were indexed: of another shard in its place?
                self._remote.shard(int(index.shard[i])).require_same()
            raise
        return np.frombuffer(data, np.uint8)

    def together(self, images: Sequence[int], at_most: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block, what this thread reads of remote images that are neighbours comes by one request.

        Args:
            images: that it reads.
            at_most: bytes that it reads of each.
        """
        return contextlib.nullcontext() if self._remote is None else self._remote.together(images, at_most)

    def image_size(self, i: int) -> tuple[int, int]:
        """Stored width and height of image ``i`` from its header.

        Raises:
            UnreadableImageError: it cannot be read, or its header is damaged or of an unsupported kind.
        """
        try:
            return image_size(self.read(i, at_most=HEADER_BYTES).tobytes())
        except InaccessibleImageError:
            raise
        except UnreadableImageError:
            # a thumbnail or colour profile can push the size further back
            return image_size(self.read(i).tobytes())

    def close(self) -> None:
        """Close the open shards."""
        with self._lock:
            self._open_shards.clear()

    def _read_local(self, shard: int, offset: int, size: int) -> bytes:
        return self._shard(shard).read(offset, size)

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            shard = self._open_shards.pop(number, None) or _opened(self._index, number)
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
            with open(index.folder / index.masks[i], "rb", opener=_open_regular) as file:
                return file.read()
        shard = _opened(index, int(index.shard[i]))
        return shard.read(int(index.mask_offset[i]), int(index.mask_size[i]))
    except OSError as error:
        raise InaccessibleImageError((error.strerror or str(error)).lower()) from error


def _open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """A file's descriptor; what has become a pipe would be waited for without end.

    Raises:
        OSError: it is no file, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file")
    return descriptor


def shard_stamp(path: Path | RemoteFolder) -> Stamp:
    """What a shard is now: its size, the time of its last change, and a hash of its first and last bytes.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(path, RemoteFolder):
        return RemoteShard(RemoteFiles(path), path.url).stamp()
    try:
        return _Shard(path).stamp()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error


def is_as_stamped(path: Path | RemoteFolder, stamp: Stamp) -> bool:
    """Whether a shard is what it was, or a copy of it; not where it is gone."""
    if isinstance(path, RemoteFolder):
        try:
            return RemoteShard(RemoteFiles(path), path.url).is_as(stamp)
        except RefusedError:
            return False
    try:
        return _Shard(path).is_as(stamp)
    except OSError:
        return False


def _opened(index: DatasetIndex, number: int) -> _Shard:
    """A shard of an index, the same as when it was indexed."""
    shard = _Shard(index.folder / index.shards[number])
    require(
        not index.stamps or shard.is_as(index.stamps[number]),
        f"{index.root / index.shards[number]} was replaced or changed since it was indexed: index the data again.",
    )
    return shard


class _Shard:
    """One open shard, closed when nothing refers to it."""

    def __init__(self, path: os.PathLike[str]) -> None:
        self._descriptor = _open_regular(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        # pread rather than a memory map: a shard cut short under a map would end the process with a bus error
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise UnreadableImageError(f"the shard ends {size - len(data)} bytes before this image does")
        return data

    def stamp(self) -> Stamp:
        facts = os.fstat(self._descriptor)
        edges = edges_of(lambda offset, size: os.pread(self._descriptor, size, offset), facts.st_size)
        return Stamp(facts.st_size, facts.st_mtime_ns, edges)

    def is_as(self, stamp: Stamp) -> bool:
        """Whether the shard is what it was; a copy of it is, too."""
        facts = os.fstat(self._descriptor)
        if facts.st_size != stamp.size:
            return False
        return facts.st_mtime_ns == stamp.time or self.stamp().edges == stamp.edges

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
