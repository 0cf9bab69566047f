"""Nodes call the coordinator with an admitted key; see `test_control_access` for persons."""

import asyncio
import os
import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.superlink import main
from starlette.requests import Request
from starlette.responses import Response

from fedlearn.deploy import keys
from fedlearn.deploy.coordinator_side import superlink
from fedlearn.deploy.coordinator_side.superlink import AdmittedNodes
from fedlearn.flower.compat.superlink import PATHS_OF_MIDDLEWARE, ForPaths, signing_key

pytestmark = pytest.mark.framework


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("k") / "keys"
    keys.create(folder, ["localhost"], ["north", "south"])
    return folder


def signed(folder, name, at=None, **changes):
    private = formats.load_ssh_private_key((folder / "nodes" / name / "node.key").read_bytes(), None)
    public = private.public_key().public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)
    stamp = (at or datetime.now(UTC)).isoformat()
    signature = private.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    headers = {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-signature": b64encode(signature).decode(),
        "flwr-timestamp": stamp,
    }
    return {**headers, **changes}


def test_a_node_of_this_federation_is_known_until_its_key_is_revoked(folder):
    nodes = AdmittedNodes(folder / "coordinator/allowed", check_interval_s=0)
    headers = signed(folder, "north")
    assert nodes.have_signed(headers)
    assert nodes.have_signed(headers)
    keys.revoke(folder, ["north"])
    assert not nodes.have_signed(headers)
    assert nodes.have_signed(signed(folder, "south"))


def test_a_damaged_file_does_not_keep_a_revoked_key_in_use(tmp_path):
    folder = tmp_path / "keys"
    keys.create(folder, ["localhost"], ["north", "south"])
    nodes = AdmittedNodes(folder / "coordinator/allowed", check_interval_s=0)
    assert nodes.have_signed(signed(folder, "north"))
    (folder / "coordinator/allowed/east.pub").write_text("damaged")
    keys.revoke(folder, ["north"])
    assert not nodes.have_signed(signed(folder, "north"))
    assert nodes.have_signed(signed(folder, "south"))
    (folder / "coordinator/allowed/south.pub").write_text("ecdsa-sha2-nistp384 AAAA")  # it is written again
    assert nodes.have_signed(signed(folder, "south"))


def test_a_file_that_is_being_written_changes_nothing(folder, tmp_path):
    nodes = AdmittedNodes(folder / "coordinator/allowed", check_interval_s=0)
    assert nodes.have_signed(signed(folder, "south"))
    half = folder / "coordinator/allowed/east.pub"
    half.write_text("ecdsa-sha2-nistp384 AAAA")
    os.utime(half, (time.time(), time.time()))
    assert nodes.have_signed(signed(folder, "south"))
    half.unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"flwr-signature": "AAAA"},
        {"flwr-signature": "not base64!"},
        {"flwr-public-key": "AAAA"},
        {"flwr-timestamp": "2026-01-01"},
        {"flwr-timestamp": "soon"},
        {"flwr-timestamp": "\u00ff"},
    ],
)
def test_headers_that_no_node_has_signed_are_refused(folder, changes):
    assert signing_key(signed(folder, "south")) is not None
    assert signing_key(signed(folder, "south", **changes)) is None
    for name in changes:
        assert signing_key({key: value for key, value in signed(folder, "south").items() if key != name}) is None


@pytest.mark.parametrize("age", [timedelta(minutes=10), timedelta(minutes=-10)])
def test_an_old_signature_is_refused(folder, age):
    assert signing_key(signed(folder, "south", at=datetime.now(UTC) - age)) is None


def test_a_key_that_is_not_admitted_is_refused(folder, tmp_path):
    keys.create(tmp_path / "others", ["localhost"], ["stranger"])
    nodes = AdmittedNodes(folder / "coordinator/allowed", check_interval_s=0)
    assert not nodes.have_signed(signed(tmp_path / "others", "stranger"))


def test_the_files_of_many_keys_are_read_at_intervals(folder, monkeypatch):
    now, looks = [100.0], []
    nodes = AdmittedNodes(folder / "coordinator/allowed")
    monkeypatch.setattr(superlink.time, "monotonic", lambda: now[0])
    look = type(nodes.folder).glob
    monkeypatch.setattr(type(nodes.folder), "glob", lambda *args: looks.append(1) or look(*args))
    for _ in range(3):
        assert nodes.have_signed(signed(folder, "south"))
    assert len(looks) == 1
    now[0] += superlink.CHECK_INTERVAL_S
    assert nodes.have_signed(signed(folder, "south"))
    assert len(looks) == 2


class Trap:
    def __getattr__(self, name):
        raise AssertionError(f"the layer reads {name}")


@pytest.mark.parametrize("name", PATHS_OF_MIDDLEWARE)
def test_a_layer_of_flower_does_nothing_for_the_paths_that_skip_it(name, monkeypatch):
    (cls,) = {layer.cls for layer in main._get_middleware() if layer.cls.__name__ == name}
    monkeypatch.setenv("FLWR_TRACING_ENABLED", "1")
    layer = cls(lambda *args: None)
    layer._license_plugin = Trap()
    paths = ("/v1/control/x", "/v1/runtime/x", "/v1/fleet/x", "/health")
    for path in (path for path in paths if not path.startswith(PATHS_OF_MIDDLEWARE[name])):
        app = SimpleNamespace(state=Trap())
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "app": app, "server": ("h", 1)}
        response = Response()
        sent = asyncio.run(layer.dispatch(Request({**scope, "query_string": b""}), partial(_later, response)))
        assert sent is response
        assert not response.headers.get("cache-control")


async def _later(value, request):
    return value


def test_a_layer_for_some_paths_handles_these_and_no_others():
    calls = []

    def layer(app):
        async def handle(scope, receive, send):
            calls.append("layer")
            await app(scope, receive, send)

        return handle

    async def app(scope, receive, send):
        calls.append(scope.get("path", scope["type"]))

    limited = ForPaths(app, layer, "/v1/fleet/")
    for scope in (
        {"type": "http", "path": "/v1/fleet/x"},
        {"type": "http", "path": "/v1/control/x"},
        {"type": "lifespan"},
    ):
        asyncio.run(limited(scope, None, None))
    assert calls == ["layer", "/v1/fleet/x", "/v1/control/x", "lifespan"]
