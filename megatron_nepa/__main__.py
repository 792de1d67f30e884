"""``python -m megatron_nepa`` is the script pretrain_nepa.py, where that is installed and not in the current folder."""

from __future__ import annotations

import sys

from megatron_nepa.training.stopping.process import exit_on_user_error
from pretrain_nepa import main

if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
