"""Shards behind URLs: ranges of them while they are the ones that were indexed, and a stream for listing them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nepa.config import require
from megatron_nepa.data.index.dataset_index import DatasetIndex, Stamp, edges_of
from megatron_nepa.data.index.walk import is_hidden
from megatron_nepa.data.remote.cache import RangeCache
from megatron_nepa.data.remote.files import CONNECTIONS, Facts, RemoteFiles
from megatron_nepa.data.remote.folder import AbsentError, Access, RefusedError, RemoteFolder, common_folder, shard_urls

_STREAM_BYTES = 1 << 22  # of one request while a shard is listed
_MOST_JOINED = 1 << 23  # bytes of one request for several images
_GAP = 1 << 16  # bytes between two images that cost less than another request
_TRUSTED_SECONDS = 300.0  # for which a shard is taken to be the one that it was
START_PATIENCE = 30.0  # seconds, before the first step


class RemoteShard:
    """One shard behind a URL.

    Args:
        files: of its source.
        url: where it is.
        stamp: what it was when it was indexed; None takes it as it is.
        cache: keeps what is read.
    """

    def __init__(
        self, files: RemoteFiles, url: str, stamp: Stamp | None = None, cache: RangeCache | None = None
    ) -> None:
        self.files, self.url, self._indexed, self._cache = files, url, stamp, cache
        self._lock, self._checked = threading.Lock(), -float("inf")

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on.

        Raises:
            ConfigError: the shard was replaced since it was indexed.
            SourceLostError: the source does not give them.
        """
        self.require_same(_TRUSTED_SECONDS)

        def fetch() -> bytes:
            try:
                return self.files.read(self.url, offset, size, self.require_same)
            except RefusedError:
                self.require_same()  # a range behind the end of a shard that is shorter now is refused
                raise

        if self._cache is None or self._indexed is None:
            return fetch()
        return self._cache.get(f"{self.url} {self._indexed} {offset} {size}", size, fetch)

    def require_same(self, trusted: float = 0.0) -> None:
        """Raise :class:`ConfigError` where the shard is another than it was when it was indexed.

        Args:
            trusted: seconds for which the last look at it counts.
        """
        if self._indexed is None or time.monotonic() - self._checked < trusted:
            return
        with self._lock:  # of several threads one looks
            if time.monotonic() - self._checked < trusted:
                return
            require(
                self.is_as(self._indexed),
                f"{self.url} was replaced or changed since it was indexed: index the data again.",
            )
            self._checked = time.monotonic()

    def is_as(self, stamp: Stamp) -> bool:
        """Whether the shard is what it was; a copy of it is, too."""
        now = self.facts()
        return now.size == stamp.size and (_time(now) == stamp.time != 0 or self._edges(now.size) == stamp.edges)

    def facts(self) -> Facts:
        """What the shard is now."""
        return self.files.facts(self.url)

    def stamp(self) -> Stamp:
        """What the shard is now, as an index keeps it; a hash of its version stands for the time of its change."""
        facts = self.facts()
        return Stamp(facts.size, _time(facts), self._edges(facts.size))

    def _edges(self, size: int) -> str:
        return edges_of(lambda offset, count: self.files.read(self.url, offset, count), size)


class RemoteShards:
    """The shards of an index whose folder is remote; safe to call from several threads.

    Args:
        index: the images.
    """

    def __init__(self, index: DatasetIndex) -> None:
        assert isinstance(index.root, RemoteFolder)
        access = index.root.access
        self._index, self._root, self._files = index, index.root, RemoteFiles(index.root)
        self._cache = None if access.cache is None else RangeCache(access.cache, access.cache_bytes)
        self._shards: dict[int, RemoteShard] = {}
        self._planned = threading.local()

    def shard(self, number: int) -> RemoteShard:
        """Shard ``number`` of the index."""
        shard = self._shards.get(number)
        if shard is None:
            stamp = self._index.stamps[number] if len(self._index.stamps) else None
            shard = RemoteShard(self._files, str(self._root / self._index.shards[number]), stamp, self._cache)
            shard = self._shards.setdefault(number, shard)
        return shard

    def read(self, number: int, offset: int, size: int) -> bytes:
        """A range of shard ``number``, out of a request that :meth:`together` has joined where there is one."""
        for request in getattr(self._planned, "requests", ()):
            if request.shard == number and request.start <= offset and offset + size <= request.stop:
                if not request.data:
                    request.data = self.shard(number).read(request.start, request.stop - request.start)
                data = request.data[offset - request.start : offset - request.start + size]
                request.wanted -= 1
                if request.wanted <= 0:
                    self._planned.requests.remove(request)
                return data
        return self.shard(number).read(offset, size)

    @contextlib.contextmanager
    def together(self, images: Sequence[int], at_most: int | None = None) -> Iterator[None]:
        """Within the block, this thread reads the ranges of images that are neighbours by one request.

        Args:
            images: that it reads, each once.
            at_most: bytes that it reads of each.
        """
        self._planned.requests = _joined(self._index, np.asarray(images, np.int64), at_most)
        try:
            yield
        finally:
            self._planned.requests = []


@dataclass
class _Request:
    shard: int
    start: int
    stop: int
    wanted: int = 1  # images that are still to be read from it
    data: bytes = field(default=b"", repr=False)


def _joined(index: DatasetIndex, images: npt.NDArray[np.int64], at_most: int | None) -> list[_Request]:
    """The requests for more than one image each."""
    size = index.size[images] if at_most is None else np.minimum(index.size[images], at_most)
    rows = sorted(zip(index.shard[images].tolist(), index.offset[images].tolist(), size.tolist(), strict=True))
    requests: list[_Request] = []
    for shard, offset, length in rows:
        last = requests[-1] if requests else None
        stop = offset + length
        if (
            last is not None
            and last.shard == shard
            and offset - last.stop <= _GAP
            and stop - last.start <= _MOST_JOINED
        ):
            last.stop, last.wanted = max(last.stop, stop), last.wanted + 1
        else:
            requests.append(_Request(shard, offset, stop))
    return [request for request in requests if request.wanted > 1]


def check_remote(index: DatasetIndex, every_shard: bool) -> None:
    """Find out before the first step that shards are there, readable and those that were indexed.

    Args:
        index: of a remote folder.
        every_shard: look at each; else at the first.

    Raises:
        ConfigError: naming the shard.
    """
    assert isinstance(index.root, RemoteFolder)
    hasty = replace(
        index.root, access=replace(index.root.access, patience=min(START_PATIENCE, index.root.access.patience))
    )
    shards = RemoteShards(replace(index, root=hasty))
    require_ranges(shards.shard(0))
    with ThreadPoolExecutor(CONNECTIONS if every_shard else 1, thread_name_prefix="shard-check") as pool:
        tasks = [
            pool.submit(shards.shard(number).require_same) for number in range(len(index.shards) if every_shard else 1)
        ]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()


def require_ranges(shard: RemoteShard) -> None:
    """Refuse a server that gives whole files alone."""
    require(
        shard.files.serves_ranges(shard.url),
        f"{shard.url} lies on a server that gives whole files alone: put the shards where byte ranges can be asked "
        "for.",
    )


def read_whole(file: RemoteFolder) -> bytes | None:
    """A small file beside the shards; None where there is none."""
    files = RemoteFiles(file)
    try:
        size = files.facts(file.url).size
    except AbsentError:
        return None
    return files.read(file.url, 0, size)


def list_remote(source: str | Path) -> tuple[RemoteFolder, list[str]]:
    """The folder and names of the tar shards that a URL, or a text file of URLs, names.

    Raises:
        ConfigError: none there, no access, or a server that gives whole files alone.
    """
    urls = shard_urls(source)
    named = urls is not None or str(source).partition("://")[2].strip("/")
    require(bool(named), f"{source} names no place: give the URL of a folder, or of tar files.")
    if urls is not None:
        folder, names = common_folder(urls, source)
    else:
        folder = RemoteFolder(str(source).rstrip("/"))
    files = RemoteFiles(replace(folder, access=Access(patience=START_PATIENCE)))
    if urls is None:
        names = [name for name in files.list() if name.lower().endswith(".tar") and not is_hidden(name)]
        require(
            bool(names), f"{source} lists no tar files, which are all that is read behind URLs: name them one by one."
        )
    first = RemoteShard(files, str(folder / names[0]))
    first.facts()  # is it there?
    require_ranges(first)
    return folder, names


def open_stream(shard: RemoteShard) -> tuple[io.BufferedReader, int]:
    """A shard as a file to be read from its beginning, and its size."""
    size = shard.facts().size
    return io.BufferedReader(_Stream(shard, size), _STREAM_BYTES), size


def _time(facts: Facts) -> int:
    """A number that changes with a shard's content, 0 where its source tells nothing: in a stamp it takes the place of
    the time of the last change, which not every source tells."""
    digest = hashlib.blake2b(facts.version.encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") if facts.version else 0


class _Stream(io.RawIOBase):
    def __init__(self, shard: RemoteShard, size: int) -> None:
        self._shard, self._size, self._place = shard, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._place))
        if count:
            buffer[:count] = self._shard.read(self._place, count)
            self._place += count
        return count
