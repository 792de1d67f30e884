"""Files behind URLs: what a source lists, what a file is now, and byte ranges of it; through fsspec's file systems."""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.remote.folder import RemoteFolder
from megatron_nepa.data.remote.retries import Patience

CONNECTIONS = 64  # requests of one process under way at once
_CONNECT_SECONDS, _READ_SECONDS = 10, 30  # without a byte, after which a request has failed
_REQUEST_SECONDS = 120  # of a whole request
_TRIES = 3
_SKIPPED_BLOCK = 1 << 16
# what a file system knows of a file that changes with its content, best first
_VERSIONS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "Content-MD5",
    "LastModified",
    "Last-Modified",
    "updated",
    "mtime",
)


class Facts(NamedTuple):
    """What a file is now: its size in bytes, and what changes with its content ("" where the source tells nothing)."""

    size: int
    version: str


class RemoteFiles:
    """Reads the files of one source; safe to call from several threads, and in a forked process.

    Args:
        folder: where they are.

    Raises:
        ConfigError: fsspec does not know such URLs, or a package is missing.
    """

    def __init__(self, folder: RemoteFolder) -> None:
        self.url, self._patiently = folder.url, Patience(folder.access.patience)
        self._process, self._system = os.getpid(), _open(folder.url)
        self._inherited: list[Any] = []

    @property
    def _files(self) -> Any:
        if self._process != os.getpid():  # its connections and its thread are the parent's
            # an instance that is dropped closes its connections, for which the parent would then wait in vain
            self._inherited.append(self._system)
            self._process, self._system = os.getpid(), _open(self.url)
        return self._system

    def facts(self, url: str) -> Facts:
        """What a file is now.

        Raises:
            RefusedError: no such file, or no access.
            SourceLostError: the source does not answer.
        """
        info = self._patiently(lambda: self._call("info", url), url)
        require(info.get("size") is not None, f"{url} comes without its size, which reading parts of it takes.")
        version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
        return Facts(int(info["size"]), version)

    def list(self) -> list[str]:
        """Names of the files below the source, sorted.

        Raises:
            RefusedError: no such folder, or no access.
            SourceLostError: the source does not answer.
        """
        folder = f"{self.url}/"  # a web server's page of its files has links relative to that
        self._patiently(lambda: self._call("ls", folder), folder)  # whose errors the next one passes over
        paths = self._patiently(lambda: self._call("find", folder), folder)
        start = self._files._strip_protocol(self.url).rstrip("/") + "/"
        return sorted(posixpath.normpath(path[len(start) :]) for path in paths if path.startswith(start))

    def read(self, url: str, offset: int, size: int, short: Callable[[], object] = lambda: None) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Args:
            url: the file.
            offset: of the first byte.
            size: how many.
            short: called where fewer come than were asked for, before they are asked for again.

        Raises:
            RefusedError: no such file, or no access.
            SourceLostError: the source does not give them all.
        """

        def once() -> bytes:
            system = self._files
            if "http" in system.protocol:
                data = bytes(_waited_for(system, _http_range, system, url, offset, size))
            else:
                data = self._call("cat_file", url, start=offset, end=offset + size)
            if len(data) != size:
                short()
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        return self._patiently(once, url)

    def serves_ranges(self, url: str) -> bool:
        """Whether parts of a file can be asked for, without getting all that stands before them."""
        if "http" not in self._files.protocol:
            return True

        async def status(system: Any) -> int:
            async with _answer(system, url, 1, 2) as response:
                return int(response.status)

        # one of several servers behind an address may do without
        return any(
            self._patiently(lambda: _waited_for(self._files, status, self._files), url) == 206 for _ in range(_TRIES)
        )

    def _call(self, name: str, url: str, **arguments: Any) -> Any:
        system = self._files
        if getattr(system, "async_impl", False):
            arguments["timeout"] = _REQUEST_SECONDS
        return getattr(system, name)(url, **arguments)


def _open(url: str) -> Any:
    """fsspec's file system for a URL, with credentials and settings from the environment and fsspec's config files."""
    scheme = url.partition("://")[0].lower()
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(f"{url} is read by fsspec: pip install 'megatron_nepa[remote]'.") from error
    require(
        scheme in fsspec.available_protocols(),
        f"{url} begins with {scheme}://, which fsspec does not know: give s3://, gs://, https:// or another of its "
        "schemes.",
    )
    _make_safe_to_fork()
    try:
        options = _OPTIONS.get(scheme, dict)()
        # an instance of its own: fsspec would give each thread one, with connections of its own
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        raise ConfigError(
            f"{url} needs a package that is not installed ({error}): pip install 'megatron_nepa[remote]'."
        ) from error
    except (TypeError, ValueError) as error:  # a host, a repository: what such a file system asks for beside the URL
        raise ConfigError(
            f"{url} cannot be opened ({error}): put what is missing into fsspec's configuration files, or give the "
            "shards under s3://, gs:// or https://."
        ) from error


@functools.cache
def _make_safe_to_fork() -> None:
    """Give a forked process a thread of its own for requests, which fsspec does by itself from 2025.5 on."""
    import fsspec.asyn

    if not hasattr(fsspec.asyn, "reset_after_fork"):
        os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


def _http_options() -> dict[str, Any]:
    import aiohttp
    from fsspec.config import conf

    # trust_env: proxies, and passwords from ~/.netrc
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
    given = {**conf.get("http", {}), **conf.get("https", {})}.get("client_kwargs", {})
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, **given}}


def _s3_options() -> dict[str, Any]:
    from fsspec.config import conf

    ours = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS, "max_pool_connections": CONNECTIONS}
    return {"config_kwargs": {**ours, **conf.get("s3", {}).get("config_kwargs", {})}}


_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(("http", "https"), _http_options),
    **dict.fromkeys(("s3", "s3a"), _s3_options),
}


def _waited_for(system: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    from fsspec.asyn import sync

    return sync(system.loop, function, *arguments, timeout=_REQUEST_SECONDS)


@contextlib.asynccontextmanager
async def _answer(system: Any, url: str, start: int, stop: int) -> AsyncIterator[Any]:
    """A web server's answer where the bytes from ``start`` to ``stop`` of a file are asked for."""
    session = await system.set_session()
    settings = dict(system.kwargs)
    headers = {**settings.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers, **settings) as response:
        system._raise_not_found_for_status(response, url)
        yield response


async def _http_range(system: Any, url: str, offset: int, size: int) -> bytearray:
    """A byte range; fsspec's own call holds the whole file in memory where a server ignores the range."""
    async with _answer(system, url, offset, offset + size) as response:
        skipped = offset
        if response.status == 206:
            place = response.headers.get("Content-Range", f"bytes {offset}-")
            if not place.startswith(f"bytes {offset}-"):
                raise OSError(f"bytes from {offset} on were asked for, and {place} came")
            skipped = 0
        data = bytearray()
        async for block in response.content.iter_chunked(_SKIPPED_BLOCK):
            data += block[skipped:]
            skipped = max(0, skipped - len(block))
            if len(data) >= size and response.status != 206:
                break
        return data if response.status == 206 else data[:size]
