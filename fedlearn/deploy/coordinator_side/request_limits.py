"""Limit the requests that Flower's SuperLink reads: senders, paths, sizes, and memory.

Flower reads and parses the body of a request before it checks the sender. A large body of a stranger could then fill
the memory. `RequestLimits` stands in front of Flower, in the interface of ASGI. It reads no body of a stranger, except
the few bytes with which a node introduces itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

MAX_BODY_BYTES = 8 * 2**20  # Flower divides a message into parts of 5 MiB
MAX_FIRST_BYTES = 2**14  # body of the first request of a node; Flower then sends the reason of a refusal
MAX_BUFFERED_BYTES = 512 * 2**20  # bodies of all requests in progress together
BODY_TIMEOUT_S = 120.0  # seconds in which a body must arrive
MAX_CONNECTIONS = 2048
FLEET, CONTROL, RUNTIME, HEALTH = "/v1/fleet/", "/v1/control/", "/v1/runtime/", "/health"
API_PREFIX = "/v1/fedlearn/"  # requests that `RunApi` answers
FIRST_CALLS = (f"{FLEET}register-node", f"{FLEET}activate-node")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Mapping[str, str]


class RequestRefused(Exception):
    """Report a request that is not passed on.

    Args:
        status: HTTP status of the response.
        reason: text of the response.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class RequestLimits:
    """Pass on only requests of known senders, with bodies of a limited size.

    Args:
        app: the application that receives the accepted requests.
        is_node: function that returns whether the headers are signed by an admitted node.
        is_person: function that returns whether the headers have the token of a person.
        max_body: largest body in bytes.
        max_buffered: largest number of bytes of all bodies in memory.
        body_timeout_s: seconds in which a body must arrive.

    Guarantees:
        No part of a body is read before the sender is known: a node, a person, or a process of this machine. The
        bodies of `FIRST_CALLS` have at most `MAX_FIRST_BYTES`. Except for the health check, no other paths exist.
    """

    def __init__(
        self,
        app: App,
        *,
        is_node: Callable[[Headers], bool],
        is_person: Callable[[Headers], bool],
        max_body: int = MAX_BODY_BYTES,
        max_buffered: int = MAX_BUFFERED_BYTES,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self.app, self.is_node, self.is_person = app, is_node, is_person
        self.max_body, self.max_buffered, self.body_timeout_s = max_body, max_buffered, body_timeout_s
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, in the interface of ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._handle(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            await asyncio.to_thread(self._check_sender, scope, headers)
            limit = MAX_FIRST_BYTES if scope["path"] in FIRST_CALLS else self.max_body
            _check_length(headers, limit)
            await self._read(receive, body, limit)
        except RequestRefused as refused:
            self._buffered -= len(body)
            return await refuse(send, refused)
        try:
            await self.app(scope, replay(bytes(body), receive), send)
        finally:
            self._buffered -= len(body)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        path = str(scope["path"])
        if path in FIRST_CALLS:
            return
        if path.startswith(FLEET):
            _refuse_if(not self.is_node(headers), 401, "Invalid SuperNode authentication")
        elif path.startswith((CONTROL, API_PREFIX)):
            _refuse_if(not self.is_person(headers), 401, "the token is missing or wrong")
        else:
            is_local = path.startswith(RUNTIME) and is_local_connection(scope)
            _refuse_if(path != HEALTH and not is_local, 404, "Not Found")

    async def _read(self, receive: Receive, body: bytearray, limit: int) -> None:
        """Read a body of a known sender into ``body``."""
        try:
            async with asyncio.timeout(self.body_timeout_s):
                while True:
                    message = await receive()
                    _refuse_if(message["type"] != "http.request", 400, "the connection was closed")
                    part = message.get("body", b"")
                    _refuse_if(len(body) + len(part) > limit, 413, "the body is too large")
                    _refuse_if(self._buffered + len(part) > self.max_buffered, 503, "too many requests in progress")
                    body += part
                    self._buffered += len(part)
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise RequestRefused(408, "the body did not arrive in time") from None


def is_local_connection(scope: Scope) -> bool:
    """Return whether the sender is a process of this machine."""
    client, server = (scope.get(end) or ("", 0) for end in ("client", "server"))
    try:
        return ipaddress.ip_address(client[0]).is_loopback or client[0] == server[0]
    except ValueError:
        return False


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    _refuse_if(not length.isdecimal() or int(length[:20]) > limit, 413, "the body is too large")


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that returns the body first, and then the further messages of the connection."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return first.pop() if first else await receive()

    return replay


async def refuse(send: Send, refused: RequestRefused) -> None:
    """Send the response to a refused request, and close the connection."""
    body = json.dumps({"detail": refused.reason}).encode()
    names = {b"content-type": b"application/json", b"content-length": b"%d" % len(body), b"connection": b"close"}
    await send({"type": "http.response.start", "status": refused.status, "headers": [*names.items()]})
    await send({"type": "http.response.body", "body": body})


def _refuse_if(condition: bool, status: int, reason: str) -> None:
    if condition:
        raise RequestRefused(status, reason)
