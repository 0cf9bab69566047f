"""Undocumented names of Flower that fedlearn uses."""

import ast
import socket
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.core import private_names
from fedlearn.errors import IncompatibleVersion
from fedlearn.flower.compat import messages, superlink, transfers
from fedlearn.flower.compat.names import FLOWER

COMPAT = Path(messages.__file__).parent
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")


@pytest.mark.parametrize("feature", FLOWER.names)
def test_the_installed_flower_has_every_name(feature):
    FLOWER.verify(feature)


def test_the_installed_version_was_tried():
    assert version("flwr") in FLOWER.tried


def test_every_imported_name_is_verified():
    verified = {name for names in FLOWER.names.values() for name in names}
    nodes = (node for path in COMPAT.glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr") and node.module not in PUBLIC:
            for alias in node.names:
                current = (f"{node.module}:{alias.name}", f"{node.module}.{alias.name}")
                assert any(name.startswith(current) for name in verified), current


def test_a_response_whose_parts_do_not_arrive_blocks_the_others_for_a_short_time(monkeypatch):
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
    from flwr.superlink.grid import http_grid

    for name in ("pull_objects", "push_objects", "inflate_object_from_contents"):
        monkeypatch.setattr(http_grid, name, getattr(http_grid, name))
    monkeypatch.setattr(transfers, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(transfers, "inflate", lambda *_: Message.__new__(Message))  # the parts are empty
    transfers.receive_on_disk(0.4, folder=None, max_bytes=100)
    start, due = time.monotonic(), {f"part{number}": 0.2 * number for number in range(6)}

    def pull(object_id):
        if time.monotonic() - start < due.get(object_id, 1e9):
            raise ObjectUnavailableError(object_id)
        children = ",".join(ids) if object_id == "message" else ""
        return f"RecordDict {children} 0\0".encode()

    settings = {"initial_backoff": 0.02, "max_concurrent_pulls": 8}
    due["message"], ids = 0.0, [*due]
    found = http_grid.pull_objects(object_ids=[*due], pull_object_fn=pull, **settings)  # slow, without a pause of 0.4 s
    assert found.keys() == due.keys()
    ids.append("lost")
    start = time.monotonic()
    with pytest.raises(ObjectPullError, match=r"no part for 0\.4 s"):
        http_grid.pull_objects(object_ids=["lost", *due], pull_object_fn=pull, **settings)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("installed", ["1.40.2", "1.43.0", "2.0"])
def test_another_version_is_refused_with_one_command_to_try(monkeypatch, installed):
    monkeypatch.setattr(private_names, "version", lambda library: installed)
    with pytest.raises(IncompatibleVersion) as refused:
        messages.identify_as_server()
    assert str(refused.value) == (
        f"flwr {installed} does not work with this version of fedlearn\n"
        "  expected  flwr>=1.41,<1.43; tried with 1.41.0, 1.42.0\n"
        '  try       pip install "flwr==1.42.0"'
    )


def test_a_missing_name_is_told(monkeypatch):
    from flwr.supercore import run

    monkeypatch.delattr(run.Run, "create_empty")
    with pytest.raises(IncompatibleVersion, match=r"has no flwr\.supercore\.run\.Run\.create_empty"):
        messages.empty_run()


@pytest.mark.parametrize(("token", "accepted"), [(b"right", True), (b"wrong", False), (b"", False)])
def test_the_superlink_lets_in_the_token_only(token, accepted):
    plugin = superlink.control_authentication(lambda given: given == b"right")
    from flwr.common.constant import ACCESS_TOKEN_KEY

    assert plugin.validate_tokens_in_metadata([(ACCESS_TOKEN_KEY, token)])[0] is accepted
    assert plugin.validate_tokens_in_metadata([(ACCESS_TOKEN_KEY, token.decode())])[0] is accepted


def test_the_command_of_the_superlink_takes_the_plugin(monkeypatch):
    module = superlink._superlink_module()
    taken = []
    monkeypatch.setattr(module, "load_control_authn_plugin", module.load_control_authn_plugin)
    monkeypatch.setattr(module, "flower_superlink", lambda: taken.append(module.load_control_authn_plugin()))
    monkeypatch.setattr(module, "uvicorn", module.uvicorn)
    monkeypatch.setattr("flwr.superlink.main._get_middleware", list)
    first = object()
    superlink.run_superlink(lambda token: False, first, max_connections=7, max_body=5)
    assert taken[0].validate_tokens_in_metadata([]) == (False, None)
    assert module.uvicorn.run.keywords["limit_concurrency"] == 7
    from flwr.superlink import main

    (middleware,) = main._get_middleware()
    assert (middleware.cls, middleware.kwargs) == (first, {"max_body": 5})


@pytest.fixture
def http_server():
    """Run the HTTP protocol of the SuperLink with a small application; return its port."""
    import uvicorn

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    protocol = superlink.http_protocol(head_timeout_s=0.3)
    config = uvicorn.Config(
        app, port=0, http=protocol, ws="none", lifespan="off", log_level="critical", timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(30)


REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "first", [b"", b"GET / HT", REQUEST + b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 2**17 + b"\r\n"]
)
def test_a_connection_without_a_whole_head_is_closed(http_server, first):
    with socket.create_connection(("127.0.0.1", http_server)) as connection:
        connection.settimeout(30)
        connection.sendall(first)
        with suppress(ConnectionResetError):
            while connection.recv(2**16):
                pass


def test_a_connection_with_requests_stays_open(http_server):
    with socket.create_connection(("127.0.0.1", http_server)) as connection:
        connection.settimeout(30)
        for _ in range(5):
            connection.sendall(REQUEST)
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
            time.sleep(0.15)


def test_a_key_of_a_removed_node_can_be_registered_again(monkeypatch, tmp_path):
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState

    monkeypatch.setattr(SqlLinkState, "create_node", SqlLinkState.create_node)  # restored at the end
    superlink.readmit_removed_keys()
    state = SqlLinkState(str(tmp_path / "flower.db"), SimpleNamespace(), SimpleNamespace())
    state.initialize()
    first = state.create_node("", "", b"key", 0, name="west")
    with pytest.raises(ValueError, match="already in use"):  # two nodes never share a key
        state.create_node("", "", b"key", 0, name="east")
    state.delete_node("", first)
    second = state.create_node("", "", b"key", 0, name="west")
    assert state.get_node_id_by_public_key(b"key") == second != first
    assert state.activate_node(second, 30)
    assert not state.activate_node(first, 30)
