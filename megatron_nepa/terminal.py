"""What a command prints reaches a terminal of any kind, and one that goes away ends nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from megatron_nepa.config import ConfigError

# packages that not every run needs, and the extra of pyproject.toml that brings each
_EXTRAS = {
    "nvidia": "cuda13 or cuda12",
    "flash_attn": "gpu",
    "transformers": "benchmark",
    **dict.fromkeys(("fsspec", "aiohttp", "s3fs", "gcsfs"), "remote"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
}
_REQUIRED = frozenset(
    {"torch", "deepspeed", "triton", "wandb", "safetensors", "matplotlib", "timm", "torchvision", "skimage", "sklearn"}
)


# what a path was refused for, where the way out is known; every other refusal is the system's own words
_WAYS_OUT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user reach it, or give another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or give another path"),
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EROFS: "give a path that can be written",
    errno.ELOOP: "mend the link, or give another path",
}


def foreseen(error: Exception) -> str | None:
    """The sentence for an error of the surroundings that a user can mend; None for any other.

    Args:
        error: that nothing nearer to its cause has made a sentence of: a package that is not installed, or a path that
            the system does not let be looked at, read or written.
    """
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    return _refused_by_system(error) if isinstance(error, OSError) else None


def _refused_by_system(error: OSError) -> str | None:
    if error.errno is None or error.strerror is None or error.filename is None:
        return None
    places = " and ".join(str(place) for place in (error.filename, error.filename2) if place is not None)
    return f"{places}: {error.strerror.lower()}; {_WAYS_OUT.get(error.errno, 'see that it is there and can be read')}."


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install, in one sentence; None where the module that was not found is not one of the packages used."""
    name = error.name or ""
    package = name.partition(".")[0]
    if package in _EXTRAS:
        extra = _EXTRAS[package]
        example = f'pip install "megatron_nepa[{extra.split()[0]}]"'
        return f"{name} is not installed; the extra {extra} brings it: {example} (in a checkout: make install)."
    if package in _REQUIRED:
        return f"{package} is not installed: install the project again (make install, or pip install megatron_nepa)."
    return None


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things in words: "1 image", "2 images".

    Args:
        number: of them.
        noun: one of them.
        plural: several, where that is not the noun with an s.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float) -> str:
    """A share of 1 as every console shows accuracies: 0.5 is "50.00%"."""
    return f"{share:.2%}"


class _Tolerant:
    """A text stream that goes nowhere from its first failed write on: a closed pipe, a terminal that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # the latter of a closed stream
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        # what is still buffered, and what native code prints, needs a place to go
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Have standard streams that were closed before the start (``>&-``, a daemon's) lead nowhere.

    Python has None for them, and the next file that is opened would get the number of one and what is printed there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, for what native code prints
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115  # until the process ends


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Print file names that are no UTF-8, and letters that the terminal lacks, with escapes; survive a closed pipe.

    ``command | head -1`` and a lost connection then leave the command to finish its work and its exit status to say
    how that went.
    """
    _open_closed_streams()
    former = sys.stdout, sys.stderr
    for stream in former:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(_Tolerant, former)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = former


@contextlib.contextmanager
def tool(name: str) -> Iterator[None]:
    """The body of a command-line tool: a user's mistake, a path that the system refuses, or a package that is not
    installed, ends it with one sentence and status 2.

    Args:
        name: of the tool, before the sentence.
    """
    with tolerant_output():
        try:
            yield
        except ConfigError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(2)
        except (ModuleNotFoundError, OSError) as error:
            sentence = foreseen(error)
            if sentence is None:
                raise
            print(f"{name}: {sentence}", file=sys.stderr)
            sys.exit(2)
        except SystemExit as end:
            if not isinstance(end.code, str):
                raise
            print(end.code, file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{name}: interrupted.", file=sys.stderr)
            sys.exit(130)
