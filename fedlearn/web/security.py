"""Check each request before it reaches the page, and add headers that limit the rights of a response in a browser."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD", "POST")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
REPORT_POLICY = (  # a report has styles and pictures inside, and no script
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox allow-popups"
)
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": PAGE_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "same-origin",  # with "no-referrer" a browser hides the origin of the form, too
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
TCP_FILE = Path("/proc/net/tcp")  # Linux: all connections, with the user of each end on this machine


class RequestGuard:
    """Refuse requests for other hosts, from other sites and from other users, and add headers to all responses.

    A page of an attacker may point its own name at this machine (DNS rebinding). Its requests have that name in the
    header ``Host``.

    Args:
        app: the application behind this one.
        hosts: accepted values of the header ``Host``, in lower case, with the port.
        same_user: True accepts only connections of the user of this process, and of root, where the system shows it.
    """

    def __init__(self, app: App, *, hosts: Collection[str], same_user: bool = False) -> None:
        self.app, self.hosts, self.same_user = app, frozenset(hosts), same_user

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it to the application or refuse it."""
        if scope["type"] != "http":
            return
        problem = self._problem(scope)
        if problem is not None:
            await _refuse(_with_headers(send), *problem)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _problem(self, scope: Scope) -> tuple[int, str] | None:
        values: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name, []).append(value)
        hosts = [host.decode("latin-1").lower() for host in values.get(b"host", [])]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return 421, "This server does not have this name."
        if scope["method"] not in METHODS:
            return 405, "This page is read-only."
        if any(site not in (b"same-origin", b"none") for site in values.get(b"sec-fetch-site", [])):
            is_navigation = values.get(b"sec-fetch-mode") == [b"navigate"] and scope["method"] == "GET"
            if not is_navigation:  # a link from another page may open this one
                return 403, "Another site may not read this page."
        origins = [origin.decode("latin-1") for origin in values.get(b"origin", [])]
        if any(origin.partition("://")[2].lower() not in self.hosts for origin in origins):
            return 403, "Another site may not read this page."
        if self.same_user and not is_same_user(scope.get("client"), scope.get("server")):
            return 403, "Another user of this machine may not read this page."
        return None


def is_same_user(client: tuple[str, int] | None, server: tuple[str, int] | None) -> bool:
    """Return whether a connection within this machine is of the user of this process, or of root.

    Linux shows the user of each connection. On other systems the answer is True.
    """
    if sys.platform != "linux" or not TCP_FILE.exists():
        return True
    try:
        ends = [_kernel_address(*client), _kernel_address(*server)] if client and server else []
    except OSError:  # no address of IPv4
        return False
    for line in TCP_FILE.read_text(encoding="ascii").splitlines()[1:]:
        words = line.split()
        if ends and words[1:3] == ends:
            return int(words[7]) in (os.getuid(), 0)
    return False


def _kernel_address(host: str, port: int) -> str:
    number = struct.unpack("=I", socket.inet_aton(host))[0]
    return f"{number:08X}:{port:04X}"


def _with_headers(send: Send) -> Send:
    async def add(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return add


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def accepted_hosts(names: Collection[str], port: int) -> frozenset[str]:
    """Return the values of ``Host`` for these names and addresses of this machine.

    >>> sorted(accepted_hosts(["localhost", "::1"], 8765))
    ['[::1]:8765', 'localhost:8765']
    """
    bracketed = [f"[{name}]" if ":" in name else name for name in names]
    usual = bracketed if port in (80, 443) else []  # a browser leaves out the usual port
    return frozenset(name.lower() for name in (*usual, *(f"{name}:{port}" for name in bracketed)))


def report_headers() -> Mapping[str, str]:
    """Return the headers of a report, which a browser shows without scripts and without rights of this site."""
    return {"content-security-policy": REPORT_POLICY}
