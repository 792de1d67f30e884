"""Tries again what fails for a while, and tells what does not pass by waiting."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_nepa.config import ConfigError
from megatron_nepa.data.remote.folder import AbsentError, RefusedError, SourceLostError
from megatron_nepa.parallel.launcher import speaks_for_its_node

T = TypeVar("T")

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0  # seconds, doubled from try to try
_SAID_AFTER = 5.0  # seconds of trouble that a user hears of
_PASSING = {408, 425, 429}  # of the statuses 400 to 499, those that another try may mend
_REFUSED = {401: "access is denied", 403: "access is denied", 404: "there is no such file"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role, AWS_ENDPOINT_URL for other servers",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or gcloud auth application-default login",
}


class Patience:
    """Tries reads of one source again; safe to call from several threads.

    Args:
        seconds: for which a read is tried, from its first failure on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        # of its own: neither the global generator nor a seed, since ranks that wait alike would come back alike
        self._draw = random.SystemRandom()
        self._lock, self._said = threading.Lock(), -float("inf")

    def __call__(self, read: Callable[[], T], url: str) -> T:
        """What ``read`` gives, tried again with growing pauses.

        Args:
            read: called with nothing.
            url: what it reads, for messages.

        Raises:
            RefusedError: no such file, or no access to it.
            SourceLostError: it still fails at the end.
        """
        begun: float | None = None
        wait = _FIRST_WAIT
        while True:
            try:
                return read()
            except ConfigError:
                raise
            except Exception as failure:  # each file system has its own: aiohttp's, botocore's, gcsfs's, OSError
                error = _cause(failure)
                reason = refusal(error, url)
                if reason is not None:
                    kind = AbsentError if reason == _REFUSED[404] else RefusedError
                    raise kind(f"{url} cannot be read: {reason}.") from error
                now = time.monotonic()
                begun = now if begun is None else begun
                if now - begun >= self.seconds:
                    raise SourceLostError(
                        f"{url} has given no bytes for {self.seconds:.3g} s ({describe(error)})."
                    ) from error
                if now - begun > _SAID_AFTER:
                    self._say(f"{url} gives no bytes ({describe(error)}): trying again for {self.seconds:.0f} s")
                time.sleep(min(wait * self._draw.uniform(0.5, 1.0), max(0.0, begun + self.seconds - now)))
                wait = min(2 * wait, _LONGEST_WAIT)

    def _say(self, line: str) -> None:
        """Tell of an outage once, though many threads meet it."""
        with self._lock:
            now = time.monotonic()
            if now - self._said > self.seconds and speaks_for_its_node(os.environ):
                print(line, file=sys.stderr, flush=True)
                self._said = now


def _cause(error: Exception) -> Exception:
    """What was behind an error: fsspec calls a file missing whatever a web server answers when asked about it."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def _status(error: Exception) -> int | None:
    """The status of a web server's answer: aiohttp's, gcsfs's, botocore's."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    found = (getattr(error, "status", None), getattr(error, "code", None), metadata.get("HTTPStatusCode"))
    return next((status for status in found if isinstance(status, int)), None)


def refusal(error: Exception, url: str) -> str | None:
    """Why another try would not help, in a few words; None where it may."""
    scheme = url.partition("://")[0]
    hint = f" (credentials come from the environment: {_CREDENTIALS[scheme]})" if scheme in _CREDENTIALS else ""
    if isinstance(error, FileNotFoundError):
        return _REFUSED[404]
    if isinstance(error, PermissionError):
        return f"{_REFUSED[403]}{hint}"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError"):
        return f"there are no credentials{hint}"
    status = _status(error)
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        return f"{_REFUSED.get(status, f'the server answers {status}')}{hint if status in (401, 403) else ''}"
    return None


def describe(error: Exception) -> str:
    """An error of any file system in one line."""
    status = _status(error)
    if status is not None:
        return f"the server answers {status}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
