"""Run a web application with uvicorn."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.errors import FedlearnError
from fedlearn.web.security import App

MAX_CONNECTIONS = 200  # further connections get status 503
LOOPBACK = "127.0.0.1"


class PortError(FedlearnError):
    """Report a port that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Listener:
    """An application and the socket on which it listens.

    Args:
        app: ASGI application.
        socket: listening socket, see `listen`.
        certificate: file with the certificate of the server; None serves without TLS.
        key: file with its private key.
        options: further settings of uvicorn.
    """

    app: App
    socket: socket.socket
    certificate: Path | None = None
    key: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """Return a socket that listens.

    Args:
        host: address of this machine.
        port: port, 0 to 65535; 0 takes a free port.
        option: option of the command, for the error.

    Raises:
        PortError: the port cannot be used.
    """
    if not 0 <= port < 65536:
        raise PortError(f"{option} is {port}\n  expected  0 to 65535; 0 takes a free port\n  advice    {option} 0")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        problem = f"{option} {port} cannot be used at {host}: {error.strerror}"
        raise PortError(f"{problem}\n  expected  a free port; 0 takes one\n  advice    {option} 0") from error
    return listener


def serve(listeners: Sequence[Listener], when_ready: Callable[[], None]) -> None:
    """Serve applications until the process is interrupted. Outside of the main thread nothing ends it.

    Args:
        listeners: applications and their sockets.
        when_ready: function that is called when all of them accept connections.

    Raises:
        KeyboardInterrupt: the process received Ctrl-C or SIGTERM.
    """
    asyncio.run(_serve(listeners, when_ready))
    raise KeyboardInterrupt


async def _serve(listeners: Sequence[Listener], when_ready: Callable[[], None]) -> None:
    servers = [_server(listener) for listener in listeners]

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    is_main = threading.current_thread() is threading.main_thread()
    for number in (signal.SIGINT, signal.SIGTERM) if is_main else ():
        asyncio.get_running_loop().add_signal_handler(number, stop)
    pairs = zip(servers, listeners, strict=True)
    tasks = [asyncio.create_task(server.serve(sockets=[listener.socket])) for server, listener in pairs]
    while not all(server.started or task.done() for server, task in zip(servers, tasks, strict=True)):
        await asyncio.sleep(0.01)
    when_ready()
    await asyncio.gather(*tasks)


def _server(listener: Listener) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:  # one handler stops all servers
            return nullcontext()

    options: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
    options |= {"server_header": False, "limit_concurrency": MAX_CONNECTIONS, "timeout_graceful_shutdown": 1}
    if listener.certificate and listener.key:
        options |= {"ssl_certfile": str(listener.certificate), "ssl_keyfile": str(listener.key)}
    return Server(uvicorn.Config(listener.app, **{**options, **listener.options}))
