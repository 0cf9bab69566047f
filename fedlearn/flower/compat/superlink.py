"""Run Flower's SuperLink with other limits, authentication and middleware."""

from __future__ import annotations

import secrets
import sys
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from fedlearn.flower.compat.names import FLOWER

HEAD_TIMEOUT_S = 30.0  # seconds in which the head of an HTTP request must arrive
# middleware of the SuperLink -> start of the paths for which it does anything
PATHS_OF_MIDDLEWARE = {
    **dict.fromkeys(
        (
            "ControlSensitiveResponseMiddleware",
            "ControlAuthenticationMiddleware",
            "ControlLicenseMiddleware",
            "ControlEventLogMiddleware",
        ),
        "/v1/control/",
    ),
    "RuntimeTracingMiddleware": "/v1/runtime/",
    **dict.fromkeys(("NodeAuthMiddleware", "FleetEventLogMiddleware"), "/v1/fleet/"),
}


def run_superlink(
    accepts: Callable[[bytes], bool], limits: Callable[..., Any], *, max_connections: int, **settings: Any
) -> None:
    """Run Flower's SuperLink with the arguments of this process.

    Args:
        accepts: returns whether a request to the Control API with this token is accepted.
        limits: class of an ASGI application that handles each request first.
        max_connections: largest number of connections; further connections get status 503.
        settings: settings of ``limits``.
    """
    FLOWER.verify("superlink")
    plugin, module = control_authentication(accepts), _superlink_module()
    module.load_control_authn_plugin = lambda: plugin
    add_middleware(limits, **settings)
    readmit_removed_keys()
    options = {"http": http_protocol(), "ws": "none", "limit_concurrency": max_connections}
    run = partial(module.uvicorn.run, timeout_keep_alive=int(HEAD_TIMEOUT_S), **options)
    module.uvicorn = SimpleNamespace(run=run)
    module.flower_superlink()


def readmit_removed_keys() -> None:
    """Make Flower's SuperLink admit a key again after the removal of its node.

    Flower keeps the key of a removed node in its table, and then refuses this key for ever. The key of the removed row
    is overwritten; the row itself remains.
    """
    FLOWER.verify("readmission")
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.constant import NodeStatus
    from flwr.supercore.state.schema.linkstate_models import Node
    from sqlalchemy import update

    state: Any = SqlLinkState
    register = state.create_node

    def create_node(self: Any, owner_aid: str, owner_name: str, public_key: bytes, *args: Any, **settings: Any) -> Any:
        removed = (Node.public_key == public_key, Node.status == NodeStatus.UNREGISTERED)
        with self.session() as session:
            session.execute(update(Node).where(*removed).values(public_key=b"removed " + secrets.token_bytes(16)))
        return register(self, owner_aid, owner_name, public_key, *args, **settings)

    state.create_node = create_node


def control_authentication(accepts: Callable[[bytes], bool]) -> Any:
    """Return the plugin with which Flower's SuperLink checks the token of a request.

    Args:
        accepts: returns whether a request with this token is accepted.
    """
    FLOWER.verify("superlink")
    from flwr.common.constant import ACCESS_TOKEN_KEY
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

    class Authentication(NoOpControlAuthnPlugin):
        def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> Any:
            token = dict(metadata).get(ACCESS_TOKEN_KEY, "")
            if not accepts(token.encode() if isinstance(token, str) else token):
                return False, None
            return super().validate_tokens_in_metadata(metadata)

    return Authentication()


def http_protocol(head_timeout_s: float = HEAD_TIMEOUT_S) -> Any:
    """Return uvicorn's protocol for HTTP, with limits of size and time for the head of a request.

    Uvicorn's other protocol (httptools) has no limit of size, and neither has a limit of time.

    Args:
        head_timeout_s: seconds in which the head of a request must arrive.
    """
    FLOWER.verify("superlink")
    from uvicorn.protocols.http.h11_impl import H11Protocol  # 64 KiB for a head

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(head_timeout_s, self._close_if_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _close_if_idle(self) -> None:
            cycle: Any = self.cycle  # the present request and its response; None before the first one
            if cycle is None or (cycle.response_complete and self.timeout_keep_alive_task is None):
                self.transport.abort()
            else:
                self._timer = self.loop.call_later(head_timeout_s, self._close_if_idle)

    return Protocol


def add_middleware(middleware: Callable[..., Any], **settings: Any) -> None:
    """Put an ASGI application in front of the other parts of Flower's SuperLink.

    Args:
        middleware: class of the application; its first argument is the next application.
        settings: further arguments.
    """
    FLOWER.verify("superlink")
    from flwr.superlink import main
    from starlette.middleware import Middleware

    others = main._get_middleware
    main._get_middleware = lambda: [Middleware(middleware, **settings), *map(_limit_to_paths, others())]


class ForPaths:
    """Apply a layer of an ASGI application to some paths only.

    Args:
        app: next application.
        layer: class of the layer.
        prefix: start of the paths.
        arguments: further arguments of the layer.
    """

    def __init__(self, app: Any, layer: Callable[..., Any], prefix: str, **arguments: Any) -> None:
        self.app, self.layer, self.prefix = app, layer(app, **arguments), prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request, in the interface of ASGI."""
        is_meant = scope["type"] == "http" and scope["path"].startswith(self.prefix)
        await (self.layer if is_meant else self.app)(scope, receive, send)


def _limit_to_paths(middleware: Any) -> Any:
    """Apply a middleware of Flower only to the paths to which it applies itself.

    Each of Flower's nine layers costs a message of a node half a millisecond, and six of them do nothing for it.
    """
    from starlette.middleware import Middleware

    limited: Any = ForPaths
    prefix = PATHS_OF_MIDDLEWARE.get(getattr(middleware.cls, "__name__", ""))
    return (
        middleware if prefix is None else Middleware(limited, layer=middleware.cls, prefix=prefix, **middleware.kwargs)
    )


@cache
def _verify_superlink() -> None:
    FLOWER.verify("superlink")


def signing_key(headers: Mapping[str, str]) -> bytes | None:
    """Return the public key (PEM) that has signed the time in the headers of a node's request.

    Flower checks this signature too, but only after it has read the body.

    Returns:
        The key, or None if the signature is not valid, or the time is not the present time.
    """
    _verify_superlink()
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        time = headers[TIMESTAMP_HEADER]
        age = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
        is_recent = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        is_valid = is_recent and verify_signature(bytes_to_public_key(key), time.encode("ascii"), signature)
    except (KeyError, ValueError, TypeError):
        return None
    return key if is_valid else None


def _superlink_module() -> Any:
    """Return the module of the SuperLink's command; its package has a function of the same name."""
    from flwr.superlink.cli import flower_superlink  # noqa: F401  (loads the module)

    module: Any = sys.modules["flwr.superlink.cli.flower_superlink"]
    for name in ("load_control_authn_plugin", "flower_superlink"):
        if not hasattr(module, name):
            raise FLOWER.incompatible(f"flwr.superlink.cli.flower_superlink:{name}")
    return module
