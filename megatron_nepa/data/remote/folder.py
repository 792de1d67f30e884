"""The place of shards that lie behind URLs, and how patiently it is asked; nothing here needs fsspec."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_nepa.config import ConfigError, DataConfig, require

_MOST_SHARDS = 10_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class SourceLostError(ConfigError):
    """The bytes of a remote shard cannot be had, though nothing is known to be wrong with its images."""


class RefusedError(SourceLostError):
    """The source answers that it does not give them; another try would not change that."""


class AbsentError(RefusedError):
    """There is no such file."""


@dataclass(frozen=True)
class Access:
    """How a remote source is read.

    Attributes:
        patience: seconds for which a read that fails is tried again before the source counts as lost.
        cache: folder of this machine that keeps what was read; None keeps nothing.
        cache_bytes: size that the folder is held to.
    """

    patience: float = 300.0
    cache: Path | None = None
    cache_bytes: int = 0

    @classmethod
    def of(cls, config: DataConfig) -> Access:
        """What a run's config says."""
        cache = None if config.remote_cache is None else Path(config.remote_cache)
        return cls(config.remote_patience, cache, int(config.remote_cache_gb * 1e9))


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL, in the place of a :class:`pathlib.Path`: ``folder / "a.tar"`` is the URL of a file in it.

    Attributes:
        url: without a slash at its end.
        access: how it is read.
    """

    url: str
    access: Access = Access()

    def __truediv__(self, name: str) -> RemoteFolder:
        return replace(self, url=f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def resolve(self) -> RemoteFolder:
        """Itself: a URL is always absolute."""
        return self


def is_url(text: str | Path) -> bool:
    """Whether a source is named by URL, such as ``s3://bucket/folder``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(text)) is not None


def shard_urls(source: str | Path) -> list[str] | None:
    """The shards that a source names one by one; None where it is the URL of a folder, or no URL.

    Args:
        source: the URL of a tar file, one with a range in braces (``https://host/train-{0000..1023}.tar``), or a text
            file that names one such a line.

    Raises:
        ConfigError: a file that cannot be read, or a line of it that is no such URL.
    """
    text = str(source)
    if is_url(text):
        try:
            urlsplit(text)
        except ValueError as error:
            raise ConfigError(f"{text} is no URL ({error}).") from None
        require(
            "::" not in text.partition("[")[0], f"{text} is a chain of URLs: give that of a tar file, or of a folder."
        )
        urls = _expanded(text)
        return urls if urlsplit(urls[0]).path.lower().endswith(".tar") else None
    if not text.lower().endswith(".txt") or not Path(text).is_file():
        return None
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text} cannot be read as a list of URLs: {error}.") from error
    require(bool(lines), f"{text} names no shards: put the URL of one in each line.")
    for number, line in enumerate(lines, 1):
        require(is_url(line), f"{text} names {line} in line {number}, which is no URL: give those of tar files.")
    return [url for line in lines for url in _expanded(line)]


def common_folder(urls: Sequence[str], source: str | Path) -> tuple[RemoteFolder, list[str]]:
    """The deepest folder that holds all of the shards, and their names in it.

    Raises:
        ConfigError: two sources, a signed URL, or a shard that is named twice.
    """
    for url in urls:
        parts = urlsplit(url)
        require(
            not parts.query and "@" not in parts.netloc,
            f"{source} names {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} with a signature or a "
            "password, which an index would keep: put credentials in the environment.",
        )
    folders = [url.split("/")[:-1] for url in urls]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    require(shared >= 3, f"{source} names shards of several sources ({urls[0]}, {urls[-1]}): index each by itself.")
    require(len(set(urls)) == len(urls), f"{source} names a shard twice: name each once.")
    folder = "/".join(folders[0][:shared])
    return RemoteFolder(folder), [url[len(folder) + 1 :] for url in urls]


def _expanded(url: str) -> list[str]:
    """A URL with ``{0000..0012}`` for every number in the range."""
    found = _RANGE.search(url)
    if found is None:
        return [url]
    first, last = int(found[1]), int(found[2])
    require(first <= last < first + _MOST_SHARDS, f"{url} has a range that holds no number, or too many.")
    width = len(found[1]) if found[1].startswith("0") else 0
    names = (f"{url[: found.start()]}{number:0{width}d}{url[found.end() :]}" for number in range(first, last + 1))
    return [name for part in names for name in _expanded(part)]
