"""A web server of a folder with byte ranges, in threads, that can be told to fail in the ways that buckets do."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Faults:
    """What goes wrong; may be changed while the server runs.

    Attributes:
        delay: seconds before an answer.
        failing: share of requests that are answered by 503.
        short: share of requests whose body ends early, as its headers say or not.
        whole: share of requests whose range is ignored.
        status: that every request is answered by, where it is not 0.
        dead: connections are closed without an answer.
    """

    delay: float = 0.0
    failing: float = 0.0
    short: float = 0.0
    whole: float = 0.0
    status: int = 0
    dead: bool = False
    requests: int = 0
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    most_at_once: int = 0


class RangeServer:
    """Serves a folder; a request for /die is its last one.

    Args:
        folder: what is served.
        faults: what goes wrong.
        port: 0 takes a free one.
    """

    def __init__(self, folder: Path, faults: Faults | None = None, port: int = 0) -> None:
        self.folder, self.faults = folder, faults or Faults()
        self._draw, self._lock, self._at_once = random.Random(0), threading.Lock(), 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def do_HEAD(self) -> None:
                server.answer(self, body=False)

            def do_GET(self) -> None:
                server.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.request_queue_size = 256
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop listening; connections that are open go on to be answered as ``faults`` says."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        """One request."""
        faults = self.faults
        with self._lock:
            faults.requests += 1
            self._at_once += 1
            faults.most_at_once = max(faults.most_at_once, self._at_once)
            failing, short, whole = (self._draw.random() for _ in range(3))
        try:
            self._answer(handler, body, failing < faults.failing, short < faults.short, whole < faults.whole)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, body: bool, failing: bool, short: bool, whole: bool) -> None:
        faults = self.faults
        time.sleep(faults.delay)
        if faults.dead:
            handler.close_connection = True
            return
        path = self.folder / unquote(urlsplit(handler.path).path).lstrip("/")
        if handler.path == "/die":
            faults.dead = True
            self._send(handler, 200, b"", {})
            return
        status = faults.status or (503 if failing else 0) or (0 if path.exists() else 404)
        if status:
            self._send(handler, status, b"an error page" if body else b"", {})
            return
        if path.is_dir():
            links = "".join(f'<a href="{entry.name}{"/" * entry.is_dir()}">x</a>' for entry in path.iterdir())
            self._send(handler, 200, links.encode(), {"Content-Type": "text/html"})
            return
        facts = path.stat()
        tag = hashlib.md5(f"{facts.st_mtime_ns} {facts.st_size} {facts.st_ino}".encode()).hexdigest()
        headers = {"ETag": f'"{tag}"', "Last-Modified": email.utils.formatdate(facts.st_mtime, usegmt=True)}
        asked = handler.headers.get("Range", "")
        if not asked or whole:
            content = path.read_bytes() if body else b""
            self._send(handler, 200, content, {**headers, "Content-Length": str(facts.st_size)}, short)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(facts.st_size, int(last) + 1)
        if start >= facts.st_size:
            self._send(handler, 416, b"", headers)
            return
        faults.ranges.append((path.name, start, stop))
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        if short and start // 512 % 2:  # an answer that is shorter, and says so
            content, short = content[: len(content) // 2], False
        headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{facts.st_size}"
        self._send(handler, 206, content, headers, short)

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], short: bool = False
    ) -> None:
        with contextlib.suppress(OSError):  # the other side has seen enough
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2] if short else content)
            handler.wfile.flush()
            handler.close_connection = handler.close_connection or short


@contextlib.contextmanager
def serving(folder: Path, **faults: float) -> Iterator[RangeServer]:
    """A server of ``folder`` until the block ends."""
    server = RangeServer(folder, Faults(**faults))  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()
