"""What runs on this machine, and what to do about what does not: the first command on a new machine.

    python tools/doctor.py [--only installation,operations,decoding,parallel] [--json]

Ends with status 1 where something failed.
"""

from megatron_nepa.doctor.checks import main
from megatron_nepa.terminal import tool

if __name__ == "__main__":
    with tool("doctor"):
        raise SystemExit(main())
