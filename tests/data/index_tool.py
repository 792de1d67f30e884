"""tools/index_dataset.py as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "index_dataset.py"


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """tools/index_dataset.py as a user runs it."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
