from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedlearn.data.sources import DataSet, Official, fetch

CONTENT = b"63,1,4,140\n44,1,4,130\n" * 500
FILE = "processed.data"


@dataclass
class Source:
    """A web server on the loopback that may misbehave for its first requests."""

    content: bytes = CONTENT
    faults: list[str] = field(default_factory=list)  # "404", "500", "cut", "wrong": one for each request, in order
    requests: int = 0
    url: str = ""
    stop: Callable[[], None] = lambda: None

    def data_set(self, name: str = "set") -> DataSet:
        checksum = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
        return DataSet(name=name, origins=(Official(base_url=self.url, files={FILE: checksum}),))


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
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

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
        thread.join(timeout=5)

    served.stop = stop
    yield served
    stop()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, no data folder, and no waiting between tries."""
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    return tmp_path / "cache"
