"""Where results go, tried before the work begins."""

from __future__ import annotations

from pathlib import Path

from megatron_nepa.config import ConfigError
from megatron_nepa.files import try_to_write


def require_writable(folder: Path) -> None:
    """Make a folder and see that files can be written in it.

    Args:
        folder: of the results; it stays, since other ranks may be using it already.

    Raises:
        ConfigError: nothing can be written there; the message gives the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder)
    except OSError as error:
        raise ConfigError(f"nothing can be written to {folder}: {error.strerror or error}.") from None
