"""Every file below a folder, or the error that kept one from being seen: a listing is never shorter in silence."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.headers import EXTENSIONS

ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
OTHER_KINDS = "files of other kinds"


@dataclass
class PassedOver:
    """What was found and is no image of the set: by kind, how many, and the first by name."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Note ``count`` things of a kind, the first of which is ``name``."""
        before, first = self.found.get(kind, (0, name))
        self.found[kind] = (before + count, min(first, name))

    def merge(self, other: PassedOver) -> None:
        """Note what was noted elsewhere."""
        for kind, (count, first) in other.found.items():
            self.add(kind, first, count)

    def note(self) -> tuple[str, ...]:
        """The number and an example of every kind, in one phrase; nothing where nothing was passed over."""
        found = [
            f"{kind} {count} ({first}{', ...' if count > 1 else ''})" for kind, (count, first) in self.found.items()
        ]
        return (f"passed over: {', '.join(found)}",) if found else ()


@dataclass
class Walked:
    """What lies below a folder; every path is relative to it."""

    # how many images, by extension, lie in each folder; those without are left out, and "" is the folder itself
    folders: dict[str, int]
    passed_over: PassedOver
    # archives directly in the folder, sorted; they are not in passed_over
    archives: list[str]
    # Arrow and parquet files anywhere below the folder, sorted
    tables: list[str]

    @property
    def images(self) -> int:
        """Images in all folders."""
        return sum(self.folders.values())

    def besides(self, tars: bool, below: str = "") -> PassedOver:
        """What was passed over.

        Args:
            tars: whether the archives directly in the folder are what is used, rather than the images.
            below: the folder's own path, which goes before the names.
        """
        found = PassedOver()
        for kind, (count, first) in self.passed_over.found.items():
            if not (tars and kind == OTHER_KINDS):  # such as the names of the classes
                found.add(kind, os.path.join(below, first), count)
        for name in () if tars else self.archives:
            found.add("archives", os.path.join(below, name))
        return found


def example(names: list[str]) -> str:
    """The first of some names, and whether there are more."""
    return ", ".join([*names[:1], *(["..."] if len(names) > 1 else [])])


def is_hidden(name: str) -> bool:
    """Whether a path has a part that belongs to a program rather than to the data (.DS_Store, __MACOSX)."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def is_image(name: str) -> bool:
    """Whether a name is an image's, by its extension."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def walk(root: Path) -> Walked:
    """The folders below ``root`` that hold images, and what was passed over.

    Hidden entries, what is neither a file nor a folder, and links that lead nowhere are passed over. A link to a folder
    is followed unless that folder is listed anyway, through its own place or an earlier link, or holds the link.

    Raises:
        ConfigError: a folder or link that cannot be read, by name.
    """
    home = os.path.realpath(root)
    walker = _Walker(root)
    walker.tree("", home)
    while walker.links:
        name, target = walker.links.popleft()
        place = os.path.realpath(os.path.dirname(os.path.join(root, name)))
        if target in walker.listed or _holds(target, place) or _holds(target, home):
            walker.passed_over.add(_LISTED, name)
        else:
            walker.tree(name, target)
    filled = {folder.split("/", 1)[0] for folder in walker.images}
    for name in sorted(walker.folders - filled):
        walker.passed_over.add("folders without images", name)
    return Walked(walker.images, walker.passed_over, sorted(walker.archives), sorted(walker.tables))


def images_in(root: Path, folder: str) -> Iterator[str]:
    """The images of one of the folders of :class:`Walked`, paths below ``root``.

    Raises:
        ConfigError: it cannot be read.
    """
    for entry in _entries(root / folder):
        if is_image(entry.name) and not is_hidden(entry.name) and _is_file(_mode(entry)):
            yield os.path.join(folder, entry.name)


_LISTED = "links to folders that are listed already or hold them"


class _Walker:
    """What was found so far below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: dict[str, int] = {}  # folder -> images in it
        self.archives: list[str] = []  # directly below root
        self.tables: list[str] = []
        self.folders: set[str] = set()  # directly below root
        self.listed: set[str] = set()  # real paths
        self.links: deque[tuple[str, str]] = deque()  # to folders: path below root, real path of the target
        self.passed_over = PassedOver()

    def tree(self, top: str, real: str) -> None:
        """List the folder ``top`` below root, which really is ``real``, and what lies below it without links."""
        waiting = [(top, real)]
        while waiting:
            folder, real = waiting.pop()
            if real in self.listed:  # a link led into a tree of which a part was linked before
                self.passed_over.add(_LISTED, folder)
                continue
            self.listed.add(real)
            if folder and "/" not in folder:
                self.folders.add(folder)
            for entry in _entries(self.root / folder):
                name = os.path.join(folder, entry.name)
                mode = None if is_hidden(entry.name) else _mode(entry)
                if mode is not None and stat.S_ISDIR(mode) and entry.is_symlink():
                    self.links.append((name, os.path.realpath(entry.path)))
                elif mode is not None and stat.S_ISDIR(mode):
                    waiting.append((name, os.path.join(real, entry.name)))
                else:
                    self._file(name, mode)

    def _file(self, name: str, mode: int | None) -> None:
        if is_hidden(os.path.basename(name)):
            kind = "hidden entries"
        elif mode is None:
            kind = "links that lead nowhere"
        elif not _is_file(mode):
            kind = "entries that are neither file nor folder"
        elif is_image(name):
            folder = os.path.dirname(name)
            self.images[folder] = self.images.get(folder, 0) + 1
            return
        elif name.lower().endswith(ARCHIVES):
            if "/" not in name:
                self.archives.append(name)
                return
            kind = "archives"
        else:
            kind = OTHER_KINDS
            self.tables += [name] if name.endswith((".parquet", ".arrow")) else []
        self.passed_over.add(kind, name)


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _mode(entry: os.DirEntry[str]) -> int | None:
    """What an entry leads to, asking the system only about links; None where it leads nowhere."""
    try:
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
        if entry.is_dir(follow_symlinks=False):
            return stat.S_IFDIR
        return entry.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ELOOP, errno.ENOTDIR):
            return None
        raise _unreadable(entry.path, error) from error


def _is_file(mode: int | None) -> bool:
    return mode is not None and stat.S_ISREG(mode)


def _holds(folder: str, path: str) -> bool:
    return os.path.commonpath((folder, path)) == folder


def _unreadable(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({(error.strerror or str(error)).lower()}), so what it holds would be missing: make it "
        "readable, or move it away."
    )
