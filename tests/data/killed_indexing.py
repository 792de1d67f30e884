"""Indexes a folder in processes that are killed one after the other, and keeps a log of what each of them did.

    python killed_indexing.py SOURCE OUT LOG KILL...

KILL is the number of the part that a process is killed over, half of it written, or "index" for the index itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_nepa.data.index.archives import TarSource
from megatron_nepa.data.index.index_writer import IndexWriter
from megatron_nepa.data.index.listing import Listed
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing import build, parts
from megatron_nepa.files import whole_or_absent

CHUNK = 3


def run(source: str, out: str, log: Path, kill: str) -> None:
    """Index in this process, which dies at ``kill``."""
    save, list_unit, saved = parts._save, TarSource.list, 0

    def note(line: str) -> None:
        with log.open("a") as file:
            print(line, file=file)

    def saving(path: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        nonlocal saved
        saved += 1
        if str(saved) == kill:
            with whole_or_absent(path) as partial:
                save(partial, arrays, metadata)
                os.truncate(partial, partial.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        save(path, arrays, metadata)
        note(f"saved {path.stem}")

    def listing(self: TarSource, unit: int) -> Listed:
        note(f"read {unit}")
        return list_unit(self, unit)

    parts._save, TarSource.list, build._CHUNK = saving, listing, CHUNK  # type: ignore[method-assign,assignment]
    if kill == "index":
        IndexWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    build.build_and_save_index(open_source(source), out, workers=1, progress=False)


def main() -> None:
    """Run until each process was killed, and once more."""
    source, out, log, *kills = sys.argv[1:]
    for kill in (*kills, ""):
        child = os.fork()
        if not child:
            run(source, out, Path(log), kill)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill else 0), (kill, status)
        assert Path(out).exists() == (not kill)


if __name__ == "__main__":
    main()
