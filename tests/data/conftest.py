from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedlearn.data.download import DataSet, OfficialSource, fetch

CONTENT = b"63,1,4,140\n44,1,4,130\n" * 500
FILE = "processed.data"


@dataclass
class Source:
    """A web server on the loopback interface with planted faults in its first requests."""

    content: bytes = CONTENT
    # one fault per request, in order: "404", "500", "cut", "wrong" or "other part"
    faults: list[str] = field(default_factory=list)
    announces_its_size: bool = True
    version: str = ""  # an ETag; with one, the server supports ranges
    requests: int = 0
    sent: int = 0  # bytes of all bodies
    url: str = ""
    stop: Callable[[], None] = lambda: None

    def data_set(self, name: str = "set") -> DataSet:
        checksum = "sha256:" + hashlib.sha256(self.content).hexdigest()
        return DataSet(name=name, origins=(OfficialSource(base_url=self.url, files={FILE: checksum}),))


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, source: Source, *args: object) -> None:
        self.source = source
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.source.requests += 1
        fault = self.source.faults.pop(0) if self.source.faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        body = b"something else" if fault == "wrong" else self.source.content
        start = self.start(len(body))
        if start > len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            shown = 7 if fault == "other part" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(body) - 1}/{len(body)}")
        if self.source.version:
            self.send_header("ETag", self.source.version)
        if self.source.announces_its_size:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        part = body[start:]
        part = part[: len(part) // 2] if fault == "cut" else part
        self.source.sent += len(part)
        with contextlib.suppress(ConnectionError):  # the client closes the connection if a file is too large
            self.wfile.write(part)

    def start(self, size: int) -> int:
        """Return the first byte of the requested range; 0 if the requested version differs."""
        wanted = self.headers.get("Range")
        if not wanted or not self.source.version or self.headers.get("If-Range") != self.source.version:
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def source() -> Iterator[Source]:
    served = Source()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, served))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/data/"

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=60)

    served.stop = stop
    yield served
    stop()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, no data folder, and no pause between attempts."""
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    return tmp_path / "cache"
