"""A folder of partial results: what it was begun with, and one process at a time."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_nepa.config import ConfigError, require
from megatron_nepa.files import AlreadyHeldError, Hold


@contextlib.contextmanager
def claimed(file: Path, facts: dict[str, Any], mismatch: str) -> Iterator[None]:
    """Make a file's folder and hold it for this process until the block, or the process, ends.

    Args:
        file: in that folder, in which ``facts`` are kept.
        facts: what the results are made from; the same ones continue them.
        mismatch: what to say where the folder was begun with others.

    Raises:
        ConfigError: another process holds the folder, it was begun with other facts, or it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+")
    except OSError as error:
        raise ConfigError(f"{file.parent} cannot be written: {error.strerror}.") from None
    with handle, contextlib.ExitStack() as stack:
        try:
            hold = Hold(file)
        except AlreadyHeldError as error:
            raise ConfigError(
                f"another process is writing {file.parent}: wait for its end, or choose another name for the result "
                f"({error})."
            ) from None
        stack.callback(hold.release)
        for note in hold.notes:
            print(note, file=sys.stderr)
        handle.seek(0)
        text, wanted = handle.read(), json.dumps(facts)
        require(text in ("", wanted), mismatch)
        if not text:
            handle.write(wanted)
            handle.flush()
        yield
