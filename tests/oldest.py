"""Prints the oldest supported release of every package as pip constraints: the lower bounds in pyproject.toml.

Those of the extras gpu, dev and docs are left out: the tests do not need them.
"""

from __future__ import annotations

import re
from pathlib import Path


def lower_bounds(pyproject: str) -> list[str]:
    """``name==version`` of every requirement ``name>=version`` in the text of a pyproject.toml."""
    project = pyproject.partition("\n[project]\n")[2]
    text = "\n".join(line for line in project.splitlines() if not line.startswith(("gpu =", "dev =", "docs =")))
    return [f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)[",]', text)]


if __name__ == "__main__":
    print("\n".join(lower_bounds((Path(__file__).parents[1] / "pyproject.toml").read_text())))
