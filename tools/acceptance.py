"""Prove on one GPU what only a GPU can show: see ``--help``.

python tools/acceptance.py [--only 1,3] [--output_dir runs/acceptance] [--again] [--patience 2] [--rehearsal]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a copy that was not installed

from megatron_nepa.acceptance.command import main
from megatron_nepa.terminal import tool

if __name__ == "__main__":
    with tool("acceptance"):
        raise SystemExit(main())
