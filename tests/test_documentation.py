"""The documentation's links lead somewhere, its commands parse, and those that need nothing special run.

A block of commands is a fenced ``bash`` block. One with a title ("Needs a Slurm cluster") says why it is not run here;
the others are run one after the other, page by page, in a copy of the checkout.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ds_configs/README.md")),
    ROOT / "examples/slurm/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LAUNCHERS = ("deepspeed", "python", "torchrun", "sbatch")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Title ("" where it has none) and text of every block of commands of a page."""
    text = page.read_text()
    for title, block in re.findall(r'^```bash(?: title="(.+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        yield title, block
    if not re.search(r"^```", text, re.MULTILINE):  # README and its like: indented blocks
        for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
            yield "not run from here", block


def commands() -> list[tuple[str, str]]:
    """Page and command line of every script that the documentation starts."""
    found = []
    for page in PAGES:
        for _, block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if line.startswith(LAUNCHERS) and ".py " in f"{line} " and "..." not in line:
                    found.append((page.name, line))
    return found


def heading_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in heading_anchors(file.read_text())):
            missing.append(target)
    assert not missing


def test_readme_is_one_screen_of_what_and_why() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


class Parsed(BaseException):
    """Raised where a script has read its command line."""


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_parse(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag of a documented command exists and takes its value."""
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = ROOT / words[start], words[start + 1 :]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    real = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> Any:
        values, rest = real(parser, *given, **options)
        if rest:
            return values, rest  # for another parser, or refused by this one
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    main = runpy.run_path(str(script), run_name="documented")["main"]
    takes_arguments = bool(main.__code__.co_argcount)
    with mock.patch.object(sys, "path", [str(script.parent), *sys.path]), pytest.raises(Parsed):
        main(arguments) if takes_arguments else main()


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    """The blocks without a title, in the order of the pages, as a reader would run them."""
    copy = tmp_path / "megatron_nepa"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    order = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    script = "\n".join(text for name in order for title, text in blocks(copy / "docs" / name) if not title)
    assert script.count("python ") >= 5
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(["bash", "-euxc", script], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
