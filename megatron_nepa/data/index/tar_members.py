"""What one tar file holds: its images, each a range of bytes, and the labels that lie beside them.

The tar format is read by Python's tarfile; WebDataset's own package streams shards in order, where a run looks
samples up by number.
"""

from __future__ import annotations

import json
import math
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.label_values import Label, decode_text, read_label
from megatron_nepa.data.index.walk import ARCHIVES, PassedOver, is_hidden, is_image

_LABEL_FIELDS = ("cls", "cls.txt", "json")
_MOST_LINKS = 16  # that lead from one to the next
_REST = 1 << 16  # bytes that are looked at at once behind the end of a tar file, which tar fills up with zeros
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


def sample_key(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, its path up to the first dot of the base name, and the field behind that dot."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


@dataclass(frozen=True)
class Member:
    """A file inside a tar file; an image's with its label."""

    name: str
    offset: int
    size: int
    group: str = ""  # name of the tar inside the tar
    label: Label = None

    @property
    def kind(self) -> tuple[Label, str, str | None]:
        """What may tell the class of an image: its label, tar inside the tar, and folder."""
        return self.label, self.group, posixpath.dirname(self.name) if "/" in self.name else None


@dataclass
class TarContent:
    """What a tar file holds.

    Attributes:
        images: in their order, each with its label.
        counters: what the user is told the sum of.
        passed_over: members that are neither images nor labels.
    """

    images: list[Member] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    passed_over: PassedOver = field(default_factory=PassedOver)


def read_tar(file: BinaryIO, path: str, size: int) -> TarContent:
    """The images of a tar file, and of the tar files inside it.

    Args:
        file: open, at any place.
        path: what it is called in messages.
        size: bytes.

    Raises:
        ConfigError: it is damaged, cannot be read in place, or gives an image two labels.
    """
    found = TarContent()
    _read_tar(file, path, 0, size, "", found)
    return found


def _read_tar(file: BinaryIO, path: str, start: int, end: int, group: str, found: TarContent) -> None:
    """Append the images of the archive in bytes [start, end) of ``file``, and of the archives inside it."""
    labels = _Labels(path)
    images: dict[str, Member] = {}
    for member in _wanted(file, path, start, end, found):
        extension = posixpath.splitext(member.name)[1].lower()
        if extension == ".tar":
            inner = group or posixpath.splitext(posixpath.basename(member.name))[0]
            _read_tar(file, f"{path}/{member.name}", member.offset, member.offset + member.size, inner, found)
        elif is_image(member.name):
            if images.pop(member.name, None) is not None:  # as tar itself: the last one counts
                found.passed_over.add("members that a later one of the same name replaces", member.name)
            images[member.name] = member
        else:
            file.seek(member.offset)
            labels.add(member.name, file.read(member.size))
    keys = [sample_key(name)[0] for name in images]
    found.counters["shared_keys"] += len(keys) - len(set(keys))
    found.images += [replace(image, group=group, label=labels.of(name)) for name, image in images.items()]
    found.counters["json_without_label"] += labels.empty
    found.counters["labels_without_image"] += labels.unused()


class _Labels:
    """The labels that the members of one tar file hold."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._of_key: dict[str, tuple[int | str, str]] = {}  # key -> label, member that holds it
        self._of_stem: dict[str, tuple[int | str, str]] = {}
        self._used: set[str] = set()  # members whose label is an image's
        self.empty = 0  # label files, which are JSON, without one

    def add(self, name: str, content: bytes) -> None:
        """Take note of a label file's content."""
        label = _label_in(name, content, f"{self._path}/{name}")
        if label is None:
            self.empty += name.lower().endswith(".json")
            return
        key, extension = sample_key(name)
        place, key = (self._of_key, key) if extension in _LABEL_FIELDS else (self._of_stem, _stem(name))
        known = place.setdefault(key, (label, name))
        self._agree(key, known, (label, name))

    def of(self, image: str) -> int | str | None:
        """The label of an image."""
        key = sample_key(image)[0]
        found = [known for known in (self._of_stem.get(_stem(image)), self._of_key.get(key)) if known is not None]
        if not found:
            return None
        self._agree(key, found[0], found[-1])
        self._used.update(member for _, member in found)
        return found[0][0]

    def unused(self) -> int:
        """Label files that no image of :meth:`of` had."""
        members = {member for place in (self._of_key, self._of_stem) for _, member in place.values()}
        return len(members - self._used)

    def _agree(self, key: str, one: tuple[int | str, str], other: tuple[int | str, str]) -> None:
        require(
            one[0] == other[0],
            f"{self._path} gives {key} two labels, {one[0]} in {one[1]} and {other[0]} in {other[1]}: give every image "
            "a key of its own.",
        )


def _stem(name: str) -> str:
    return name[: -len(".cls.txt")] if name.lower().endswith(".cls.txt") else posixpath.splitext(name)[0]


def _is_label(name: str) -> bool:
    return name.lower().endswith(tuple(f".{extension}" for extension in _LABEL_FIELDS))


def _label_in(name: str, content: bytes, where: str) -> int | str | None:
    """The label of a .cls file, or under "label" in a .json file; None where there is none."""
    if name.lower().endswith(".json"):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return None
        value = value.get("label") if isinstance(value, dict) else value
        value = None if isinstance(value, float) and math.isnan(value) else value
        text = "" if isinstance(value, bool) or not isinstance(value, (int, float, str)) else str(value)
    else:
        text = decode_text(content, where)
    text = text.strip()
    require("\n" not in text and "\r" not in text, f"{where} holds more than one line: a class file holds one label.")
    return read_label(text, where) if text else None


def _wanted(file: BinaryIO, path: str, start: int, end: int, found: TarContent) -> list[Member]:
    """Images, label files and archives, in their order, with links replaced by what they lead to."""
    wanted: list[Member] = []
    links: dict[str, str] = {}
    for member in _members(file, path, start, end):
        name = posixpath.normpath(member.name)
        if member.isdir():
            continue
        if is_hidden(name):
            found.passed_over.add("hidden entries", name)
            continue
        if name.lower().endswith(ARCHIVES):
            require_plain(f"{path}/{name}")
        elif not (is_image(name) or _is_label(name)):
            found.passed_over.add("files of other kinds", name)
            continue
        if member.issym() or member.islnk():
            folder = posixpath.dirname(name) if member.issym() else ""
            links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            wanted.append(Member(name, -1, 0))
        elif not member.isfile():
            found.passed_over.add("entries that are neither file nor folder", name)
        elif member.issparse():
            raise ConfigError(f"{path} holds {name} as a sparse file, which cannot be read in place: pack it again.")
        else:
            wanted.append(Member(name, member.offset_data, member.size))
    return _resolved(file, path, start, end, wanted, links) if links else wanted


def _resolved(
    file: BinaryIO, path: str, start: int, end: int, wanted: list[Member], links: dict[str, str]
) -> list[Member]:
    files = {
        posixpath.normpath(member.name): member
        for member in _members(file, path, start, end)
        if member.isfile() and not member.issparse()
    }
    resolved = []
    for member in wanted:
        target = member.name
        for _ in range(_MOST_LINKS if member.offset < 0 else 0):
            target = links.get(target, target)
        if member.offset < 0:
            require(
                target in files and target not in links,
                f"{path} holds {member.name} as a link to {links[member.name]}, which it does not hold: pack it again "
                "with --dereference.",
            )
            member = Member(member.name, files[target].offset_data, files[target].size)
        resolved.append(member)
    return resolved


def _members(file: BinaryIO, path: str, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Every member of the archive in bytes [start, end) of ``file``.

    Raises:
        ConfigError: it is damaged or cut short.
    """
    count = 0
    try:
        file.seek(start)
        first = file.read(min(6, end - start))
        kind = next((name for magic, name in _COMPRESSED.items() if first.startswith(magic)), None)
        require(kind is None, f"{path} is compressed ({kind}): images are read from tar files in place, so unpack it.")
        file.seek(start)
        archive = tarfile.TarFile(fileobj=file)
        before = start - 1
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # a million TarInfo objects would stay in memory
            whole = member.size >= 0 and member.offset_data + member.size <= end and archive.offset > before
            if not whole and not member.issparse():  # which stores less than its size
                raise tarfile.ReadError("cut short")
            before = archive.offset
            yield member
            count += 1
        # tarfile ends in silence at damage behind the first header: only a block of zeros marks the true end
        file.seek(archive.offset)
        block = file.read(max(0, min(512, end - archive.offset)))
        ended = len(block) == 512 and not any(block)
        while ended and (rest := file.read(max(0, min(_REST, end - file.tell())))):
            require(
                not any(rest),
                f"{path} holds more behind the mark of its end (two tar files joined?), which no reader sees: "
                "unpack it (tar --ignore-zeros -xf) and pack it again.",
            )
    except ConfigError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path} is cut short or damaged behind its first {count} members ({error}): get it again, or move it away."
        ) from error
    require(
        ended,
        f"{path} ends without the mark of a tar file's end behind its first {count} members, so it may be cut short: "
        "get it again, or move it away; if it is known to be whole, append the mark (head -c 1024 /dev/zero).",
    )


def require_plain(path: str) -> None:
    """Refuse an archive of another kind, or one that is compressed.

    Raises:
        ConfigError: naming it.
    """
    require(
        path.lower().endswith(".tar"),
        f"{path} is no plain tar file: images are read from tar files in place, so unpack it, or move it away.",
    )
