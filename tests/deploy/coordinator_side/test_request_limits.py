"""The coordinator reads no body of a stranger, and no body above its limit."""

import asyncio
import json

import pytest

from fedlearn.deploy.coordinator_side.request_limits import RequestLimits, is_local_connection

NODE, OPERATOR = {"node": "admitted"}, {"operator": "token"}
REMOTE, LOCAL = ("203.0.113.9", 5), ("127.0.0.1", 5)


class Request:
    """A request in the interface of ASGI; it records which part of its body was read."""

    def __init__(self, path, headers=(), parts=(b"body",), client=REMOTE, length=None, delay=0.0):
        names = {**dict(headers), **({} if length is None else {"Content-Length": str(length)})}
        self.scope = {
            "type": "http",
            "path": path,
            "client": client,
            "server": ("10.0.0.1", 8000),
            "headers": [(name.lower().encode(), value.encode()) for name, value in names.items()],
        }
        self.parts, self.sent, self.num_read, self.delay = list(parts), [], 0, delay

    async def receive(self):
        await asyncio.sleep(self.delay)
        self.num_read += 1
        body = self.parts.pop(0) if self.parts else b""
        return {"type": "http.request", "body": body, "more_body": bool(self.parts)}

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"]


class App:
    """The application behind the limits; it records the bodies that it receives."""

    def __init__(self):
        self.bodies, self.during = [], []

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        self.during.append(self.limits._buffered)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def limited(**settings):
    app = App()
    app.limits = RequestLimits(
        app,
        is_node=lambda headers: headers.get("node") == "admitted",
        is_person=lambda headers: headers.get("operator") == "token",
        **{"max_body": 100, "max_buffered": 150, **settings},
    )
    return app


def handle(app, *requests):
    async def run():
        await asyncio.gather(*(app.limits(request.scope, request.receive, request.send) for request in requests))

    asyncio.run(run())
    assert app.limits._buffered == 0
    return [request.status for request in requests]


@pytest.mark.parametrize(
    ("path", "headers", "client", "status"),
    [
        ("/v1/fleet/push-object", {}, REMOTE, 401),
        ("/v1/fleet/push-object", {"node": "stranger"}, REMOTE, 401),
        ("/v1/fleet/push-object", OPERATOR, REMOTE, 401),
        ("/v1/fleet/push-object", {}, LOCAL, 401),
        ("/v1/fleet/activate-node/", {}, REMOTE, 401),
        ("/v1/fleet/activate-node", {}, REMOTE, 200),  # Flower refuses it, and names the reason
        ("/v1/fleet/register-node", {}, REMOTE, 200),
        ("/v1/fleet/push-object", NODE, REMOTE, 200),
        ("/v1/control/start-run", {}, REMOTE, 401),
        ("/v1/control/start-run", {"operator": "guess"}, REMOTE, 401),
        ("/v1/control/get-login-details", {}, REMOTE, 401),
        ("/v1/control/start-run", NODE, REMOTE, 401),
        ("/v1/control/start-run", OPERATOR, REMOTE, 200),
        ("/v1/runtime/push-object", {**NODE, **OPERATOR}, REMOTE, 404),
        ("/v1/runtime/push-object", {}, LOCAL, 200),
        ("/v1/runtime/push-object", {}, ("10.0.0.1", 9), 200),
        ("/health", {}, REMOTE, 200),
        ("/docs", OPERATOR, REMOTE, 404),
        ("/openapi.json", {}, LOCAL, 404),
        ("/healthy", {}, REMOTE, 404),
        ("//v1/fleet/push-object", NODE, REMOTE, 404),
    ],
)
def test_only_known_senders_get_through_and_no_body_of_others_is_read(path, headers, client, status):
    app, request = limited(), Request(path, headers, client=client)
    assert handle(app, request) == [status]
    assert request.num_read == (status == 200)
    assert app.bodies == [b"body"] * (status == 200)


@pytest.mark.parametrize(
    ("parts", "length", "status", "num_read"),
    [
        ([b"x" * 100], 100, 200, 1),
        ([b"x" * 40] * 2, None, 200, 2),
        ([b"x" * 101], 101, 413, 0),
        ([b"x"], 10**30, 413, 0),
        ([b"x"], "1e9", 413, 0),
        ([b"x"], -1, 413, 0),
        ([b"x" * 40] * 50, None, 413, 3),
        ([b"x" * 40] * 50, 10, 413, 3),  # the length in the header is too small
    ],
)
def test_a_large_body_of_a_node_is_refused_before_it_is_read(parts, length, status, num_read):
    app, request = limited(), Request("/v1/fleet/push-object", NODE, parts, length=length)
    assert handle(app, request) == [status]
    assert request.num_read == num_read
    if status == 413:
        assert not app.bodies
        assert (b"connection", b"close") in request.sent[0]["headers"]
        assert json.loads(request.sent[1]["body"]) == {"detail": "the body is too large"}


@pytest.mark.parametrize("length", [None, 2**14 + 1])
def test_a_node_introduces_itself_with_few_bytes(length):
    app, request = (
        limited(max_body=2**20, max_buffered=2**20),
        Request("/v1/fleet/activate-node", {}, [b"x" * 2**14, b"x"], length=length),
    )
    assert handle(app, request) == [413]
    assert request.num_read == (2 if length is None else 0)


def test_all_bodies_together_have_a_limit():
    app = limited()
    requests = [Request("/v1/fleet/push-object", NODE, [b"x" * 30] * 3, delay=0.01) for _ in range(4)]
    assert sorted(set(handle(app, *requests))) == [200, 503]
    assert max(app.during) <= 150
    assert handle(app, Request("/v1/fleet/push-object", NODE)) == [200]


def test_a_body_that_does_not_arrive_is_refused():
    app = limited(body_timeout_s=0.05)
    assert handle(app, Request("/v1/fleet/push-object", NODE, [b"x"] * 99, delay=0.02)) == [408]


@pytest.mark.parametrize(
    ("client", "local"),
    [(("127.0.0.1", 1), True), (("::1", 1), True), (REMOTE, False), (None, False), (("", 0), False), (("x", 0), False)],
)
def test_processes_of_this_machine_are_known_by_their_address(client, local):
    assert is_local_connection({"client": client, "server": ("10.0.0.1", 8000)}) == local


def test_a_connection_of_another_kind_is_not_passed_on():
    app = limited()
    request = Request("/v1/fleet/push-object", NODE)
    request.scope["type"] = "websocket"
    asyncio.run(app.limits(request.scope, request.receive, request.send))
    assert (app.bodies, request.sent) == ([], [])
