"""What runs on this machine, and what to do about what does not: the first command on a new machine.

    python tools/doctor.py [--only installation,operations,decoding,parallel] [--json]

Ends with status 1 where something failed.
"""

from megatron_nepa.config import ConfigError
from megatron_nepa.doctor.checks import main

if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ConfigError as error:
        raise SystemExit(f"doctor: {error}") from None
