from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
from needs import needs

needs("starlette", "uvicorn")

from fedlearn.web.app import build_app  # noqa: E402
from fedlearn.web.security import accepted_hosts  # noqa: E402
from fedlearn.web.server import LOOPBACK, Listener, listen, serve  # noqa: E402


@pytest.fixture
def served():
    """Return a function that serves a source on loopback in a thread, and returns the address."""
    loops = []

    def start(source, **options):
        socket = listen(LOOPBACK, 0)
        port = socket.getsockname()[1]
        app = build_app(source, hosts=accepted_hosts((LOOPBACK, "localhost"), port), interval_s=0.05, **options)
        ready = threading.Event()

        def when_ready():
            loops.append(asyncio.get_running_loop())
            ready.set()

        threading.Thread(
            target=serve_quietly, args=([Listener(app=app, socket=socket)], when_ready), daemon=True
        ).start()
        assert ready.wait(60)
        return f"http://{LOOPBACK}:{port}"

    yield start
    for loop in loops:
        loop.call_soon_threadsafe(lambda loop=loop: [task.cancel() for task in asyncio.all_tasks(loop)])


def serve_quietly(*arguments):
    with suppress(KeyboardInterrupt, asyncio.CancelledError):
        serve(*arguments)
